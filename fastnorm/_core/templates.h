/* The files that are compiled twice, in their order. */
#include "storage.h"

#include "scales.h"

#include "normalize.h"

#include "contiguous.h"

#include "rows.h"

#include "strided.h"

#include "walk.h"

#include "backward_sums.h"

#include "backward_apply.h"

#include "backward_item.h"

#include "backward_tasks.h"
