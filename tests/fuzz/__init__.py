"""Random calls of every public function, on memory that shows each byte read or written too many.

`cases.py` draws calls, `arenas.py` lays their arrays out, `checks.py` makes a call and judges it,
`__main__.py` runs many in processes of their own and makes a failing one small.
"""
