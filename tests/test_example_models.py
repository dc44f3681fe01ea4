"""The examples that run published models: against the transformers package, with random weights.

Folders are written by `save_pretrained`, as those on the Hugging Face Hub are.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import fastnorm as fn

from .helpers import ROOT, Array, run_python

EXAMPLES = ROOT / "docs" / "examples"

if not EXAMPLES.exists():  # the tests of a wheel come without docs/
    pytest.skip("no docs/examples here", allow_module_level=True)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

sys.path.insert(0, str(EXAMPLES))  # as for a program that is run there
gpt2, llama, bert, huggingface = map(
    importlib.import_module, ("gpt2", "llama", "bert", "huggingface")
)
sys.path.remove(str(EXAMPLES))

WORDS = 211
CLOSE = 1e-4  # logits here are of order 1 to 10, sums of some hundred terms
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
}  # fmt: skip

# By name: the class of the model, and what is not as usual in its configuration.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, tied": ("GPT2", {"n_embd": 48, "n_head": 4, "n_layer": 2}),
    "gpt2, untied": (
        "GPT2",
        {"n_embd": 96, "n_head": 3, "n_layer": 4, "n_inner": 100, "tie_word_embeddings": False,
         "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2, other scales": (
        "GPT2",
        {"n_embd": 64, "n_head": 8, "n_layer": 3, "scale_attn_by_inverse_layer_idx": True,
         "scale_attn_weights": False},
    ),
    "llama, untied": (
        "Llama",
        {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
         "intermediate_size": 80, "rms_norm_eps": 1e-3},
    ),
    "llama, tied, shared keys": (
        "Llama",
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
         "num_hidden_layers": 4, "intermediate_size": 100, "head_dim": 12,
         "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama, stretched positions": (
        "Llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1,
         "num_hidden_layers": 3, "intermediate_size": 64, "rope_parameters": LLAMA3},
    ),
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "tied": {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2},
    "untied": {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 4,
               "tie_word_embeddings": False, "hidden_act": "relu", "layer_norm_eps": 1e-3},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices are small, and threads of PyTorch, BLAS and ours wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, "blas"), fn.threads(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Makes a model of the transformers package and its folder, once each."""

    @lru_cache
    def make(kind: str, name: str, dtype: str = "float32", **saving: Any) -> tuple[Any, Path]:
        options = ENCODERS[name] if kind.startswith("Bert") else DECODERS[name][1]
        family = "Bert" if kind.startswith("Bert") else DECODERS[name][0]
        config = getattr(transformers, f"{family}Config")(
            vocab_size=WORDS, bos_token_id=None, eos_token_id=None, initializer_range=0.1, **options
        )
        model = getattr(transformers, kind)(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # norms and biases begin as 1 and 0, which would hide a mistake
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        folder = tmp_path_factory.mktemp("model")
        model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
        return type(model).from_pretrained(folder, dtype=torch.float32).eval(), folder

    return make


def decoder(make: Callable[..., tuple[Any, Path]], name: str, **options: Any) -> tuple[Any, Any]:
    """Theirs and ours."""
    family = DECODERS[name][0]
    kind = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[family]
    theirs, folder = make(kind, name, **options)
    return theirs, {"GPT2": gpt2.GPT2, "Llama": llama.Llama}[family](folder)


def tokens_of(*shape: int) -> Array:
    return np.random.default_rng(0).integers(WORDS, size=shape)


def logits_of(model: Any, tokens: Array, **options: Any) -> Array:
    with torch.no_grad():
        found: Array = model(torch.from_numpy(tokens), **options).logits.numpy()
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_has_the_logits_of_transformers(name: str, folder_of: Any) -> None:
    theirs, ours = decoder(folder_of, name)
    tokens = tokens_of(3, 60)
    right = logits_of(theirs, tokens)
    found = ours.logits(ours(tokens))
    assert found.dtype == np.float32
    assert right.std() > 0.5  # there is something to be wrong about
    np.testing.assert_allclose(found, right, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_generates_the_tokens_of_transformers(name: str, folder_of: Any) -> None:
    theirs, ours = decoder(folder_of, name)
    prompt = tokens_of(2, 9)
    right = theirs.generate(
        torch.from_numpy(prompt), attention_mask=torch.ones(prompt.shape, dtype=torch.int64),
        max_new_tokens=50, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    found = np.stack(list(huggingface.generate(ours, prompt, 50)), 1)
    np.testing.assert_array_equal(found, right[:, 9:].numpy())


@pytest.mark.parametrize("name", ["gpt2, tied", "llama, tied, shared keys"])
def test_cache_changes_nothing(name: str, folder_of: Any) -> None:
    """In pieces of several tokens, of one, and at once: the same but for rounding."""
    _, ours = decoder(folder_of, name)
    tokens, cache = tokens_of(2, 12), huggingface.Cache(12)
    pieces = [ours(tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 10), (10, 12))]
    np.testing.assert_allclose(np.concatenate(pieces, 1), ours(tokens), rtol=0, atol=1e-5)


def test_bfloat16_in_several_files(folder_of: Any) -> None:
    """The weights are those of bfloat16, all that is computed is float32."""
    theirs, ours = decoder(
        folder_of, "llama, tied, shared keys", dtype="bfloat16", max_shard_size="50KB"
    )
    assert len(ours.weights["norm.weight"]) == 64
    tokens = tokens_of(2, 20)
    np.testing.assert_allclose(
        ours.logits(ours(tokens)), logits_of(theirs, tokens), rtol=0, atol=CLOSE
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_bert_has_the_logits_of_transformers(name: str, folder_of: Any) -> None:
    theirs, folder = folder_of("BertForMaskedLM", name)
    ours = bert.BERT(folder)
    tokens, types = tokens_of(3, 40), np.arange(40) >= np.array([[20], [10], [30]])
    mask = (np.arange(40) < np.array([[40], [17], [33]])).astype(np.int64)
    right = logits_of(
        theirs, tokens, attention_mask=torch.from_numpy(mask),
        token_type_ids=torch.from_numpy(types.astype(np.int64)),
    )  # fmt: skip
    found = ours.logits(ours(tokens, mask, types.astype(int)))
    assert right.std() > 0.5
    np.testing.assert_allclose(found, right, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(
        ours.logits(ours(tokens)), logits_of(theirs, tokens), rtol=0, atol=CLOSE
    )


def test_bert_without_a_head(folder_of: Any) -> None:
    """Other names in the file, and the pooled state."""
    theirs, folder = folder_of("BertModel", "tied")
    tokens = tokens_of(2, 11)
    with torch.no_grad():
        right = theirs(torch.from_numpy(tokens))
    ours = bert.BERT(folder)
    hidden = ours(tokens)
    np.testing.assert_allclose(hidden, right.last_hidden_state.numpy(), rtol=0, atol=CLOSE)
    pooled = right.pooler_output.numpy()
    np.testing.assert_allclose(ours.pooled(hidden), pooled, rtol=0, atol=CLOSE)


def test_old_names_of_norms(folder_of: Any, tmp_path: Path) -> None:
    """As in the published file of bert-base-uncased."""
    from safetensors.numpy import load_file, save_file

    _, folder = folder_of("BertForMaskedLM", "tied")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): w
        for name, w in load_file(folder / "model.safetensors").items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in old
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tokens = tokens_of(1, 5)
    found, right = (m(tokens) for m in (bert.BERT(tmp_path), bert.BERT(folder)))
    np.testing.assert_array_equal(found, right)


# --- The commands ---------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """One that knows words w0, w1, ..."""
    import tokenizers

    words = {f"w{i}": i for i in range(WORDS - 1)} | {"[MASK]": WORDS - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["gpt2, tied", "llama, untied"])
def test_command_completes(
    name: str, folder_of: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, ours = decoder(folder_of, name)
    right = [int(t[0]) for t in huggingface.generate(ours, np.array([[3, 5, 7]]), 6)]
    model_of, arguments = type(ours), [str(tmp_path), "3 5 7", "--tokens", "--count", "6"]
    kind = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[DECODERS[name][0]]
    _, folder = folder_of(kind, name)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert huggingface.main(model_of, arguments) == 0
    assert capsys.readouterr().out == " ".join(map(str, right)) + "\n"
    write_tokenizer(tmp_path)
    assert huggingface.main(model_of, [str(tmp_path), "w3 w5 w7 ", "--count", "6"]) == 0
    text = " ".join("[MASK]" if t == WORDS - 1 else f"w{t}" for t in right)
    assert capsys.readouterr().out == f"w3 w5 w7 {text}\n"
    # ends where the model says so
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": right[2]}))
    assert huggingface.main(model_of, arguments) == 0
    found = capsys.readouterr().out.split()
    assert found == [str(t) for t in right[: right.index(right[2])]]


def test_command_fills_in(folder_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = folder_of("BertForMaskedLM", "tied")
    write_tokenizer(folder)
    assert bert.main([str(folder), "w1 [MASK] w2 [MASK]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    ours = bert.BERT(folder)
    logits = ours.logits(ours(np.array([[1, WORDS - 1, 2, WORDS - 1]])))[0]
    for line, scores in zip(lines, logits[[1, 3]]):
        assert line.startswith(f"w{scores.argmax()} ")
        assert len(line.split(", ")) == 5


def test_without_pytorch(folder_of: Any) -> None:
    """A process of its own, in which nothing imports torch."""
    _, folder = folder_of("GPT2LMHeadModel", "gpt2, tied")
    program = (
        "import sys, pathlib; sys.path.insert(0, 'docs/examples'); import gpt2, huggingface\n"
        f"huggingface.main(gpt2.GPT2, [{str(folder)!r}, '1 2', '--tokens', '--count', '3'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


def test_what_cannot_be_read(folder_of: Any) -> None:
    _, folder = folder_of("GPT2LMHeadModel", "gpt2, tied")
    with pytest.raises(ValueError, match="holds a model of type 'gpt2', not 'llama'"):
        llama.Llama(folder)
    model = gpt2.GPT2(folder)
    with pytest.raises(ValueError, match="no more than 1024 positions"):
        model(tokens_of(1, 1025))
    with pytest.raises(ValueError, match="of type 'yarn' are not known"):
        llama.frequencies({"rope_scaling": {"rope_type": "yarn"}}, 8)
