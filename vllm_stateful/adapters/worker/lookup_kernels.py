# SPDX-License-Identifier: Apache-2.0
"""Looks up drafts on the device, in small Triton kernels. No token leaves the GPU.

The kernels search the text itself and the earlier answers of its agent for the longest match with
the end of the text. Of matches with the same length, one in the text itself wins, and the newest of
those. The tokens that follow the match are drafted. The chance of a drafted token depends on the
length of the match that it continues, and is learned from what was verified. With a drafting head,
two more kernels compare both drafts with the tokens that came, and choose one of them
(`speculate/beside_head.py` says how).

Sources: prompt lookup decoding (Saxena 2023); for the scan over blocks of a text, vLLM's
``v1/worker/gpu/spec_decode/ngram/speculator.py``; for the other answers of an agent, SuffixDecoding
(arXiv:2411.04975).
"""

from vllm.triton_utils import tl, triton

BLOCK = 256
"""Places that one program compares."""

MAX_PLACES = 1 << 25
"""The most places of a text. A match is packed into 31 bits: its place in the low 25, its length
above."""

_PLACE_BITS = tl.constexpr(25)
_PLACE_MASK = tl.constexpr(MAX_PLACES - 1)

NUM_COLUMNS = 4
"""Columns of the table of requests: the start of the answers of its agent, the number of their
tokens, the length of the match of the last draft, and the number of tokens of that draft."""


@triton.jit
def find_kernel(
    ends_ptr,  # int32 [max_num_reqs, stride]: the tokens of each request
    stride,
    states_ptr,  # [num_reqs]: row of each request in the tables
    lengths_ptr,  # int32 [max_num_reqs]
    num_sampled_ptr,  # int32 [num_reqs]
    answers_ptr,  # int32 [...]
    table_ptr,  # int32 [max_num_reqs, 4]
    best_ptr,  # int32 [num_reqs, num_columns]: the best match of each block
    best_stride,
    column,
    OWN: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the longest match that ends in a block of places; of several, the newest."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    out = best_ptr + row * best_stride + column + block
    state = tl.load(states_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + state)
    own = ends_ptr + state * stride
    if OWN:
        text = own
        num_text = length
    else:
        text = answers_ptr + tl.load(table_ptr + state * 4).to(tl.int64)
        num_text = tl.load(table_ptr + state * 4 + 1)
    if (tl.load(num_sampled_ptr + row) <= 0) | (block * BLOCK >= num_text):
        tl.store(out, 0)
        return
    places = block * BLOCK + tl.arange(0, BLOCK)  # of the token that would be drafted
    alive = places < num_text
    if not OWN:
        alive = alive & (tl.load(text + places, mask=alive, other=-1) >= 0)
    matched = tl.zeros([BLOCK], dtype=tl.int32)
    step = 0
    going = length > 0
    while going:
        wanted = tl.load(own + length - 1 - step)
        alive = alive & (places > step)
        alive = alive & (tl.load(text + places - 1 - step, mask=alive, other=-1) == wanted)
        matched += alive.to(tl.int32)
        step += 1
        going = (step < MAX_MATCH) & (step < length) & (tl.max(alive.to(tl.int32), axis=0) > 0)
    packed = tl.where(matched > 0, (matched << _PLACE_BITS) | places, 0)
    tl.store(out, tl.max(packed, axis=0))


@triton.jit
def draft_kernel(
    ends_ptr,
    stride,
    states_ptr,
    lengths_ptr,
    last_ptr,  # int64 [max_num_reqs]: the token sampled last
    answers_ptr,
    table_ptr,
    best_ptr,
    best_stride,
    num_own_columns,
    num_columns,
    counts_ptr,  # float32 [2, MAX_MATCH + 1]: drafted and accepted, by length of the match
    drafts_ptr,  # int64 [num_reqs, K]
    chances_ptr,  # float32 [num_reqs, K]
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
    MAX_MATCH: tl.constexpr,
):
    """Draft what follows the best match. Where nothing follows, repeat the last token, chance 0."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(states_ptr + row).to(tl.int64)
    columns = tl.arange(0, COLUMNS_BLOCK)
    found = tl.load(best_ptr + row * best_stride + columns, mask=columns < num_columns, other=0)
    own = tl.max(tl.where(columns < num_own_columns, found, 0), axis=0)
    other = tl.max(tl.where(columns >= num_own_columns, found, 0), axis=0)
    is_own = (own >> _PLACE_BITS) >= (other >> _PLACE_BITS)
    best = tl.where(is_own, own, other)
    match = best >> _PLACE_BITS
    place = best & _PLACE_MASK

    # A match that overlaps the end of the text repeats itself. (Scalars are compared with masks and
    # not combined with them, which Triton's interpreter cannot do.)
    index = tl.arange(0, K_BLOCK)
    num_own = tl.where(is_own & (match > 0), K, 0)
    period = tl.maximum(tl.load(lengths_ptr + state) - place, 1)
    text = ends_ptr + state * stride + place + index % period
    tokens = tl.load(text, mask=index < num_own, other=-1)
    start = tl.load(table_ptr + state * 4).to(tl.int64)
    num_behind = tl.load(table_ptr + state * 4 + 1) - place
    num_said = tl.where(is_own | (match == 0), 0, tl.minimum(num_behind, K))
    said = tl.load(answers_ptr + start + place + index, mask=index < num_said, other=-1)
    tokens = tl.maximum(tokens, said)
    drafted = tl.cumsum((tokens < 0).to(tl.int32), axis=0) == 0

    matched = tl.minimum(match + index, MAX_MATCH)
    tried = tl.load(counts_ptr + matched, mask=drafted, other=1.0)
    kept = tl.load(counts_ptr + MAX_MATCH + 1 + matched, mask=drafted, other=0.0)
    last = tl.load(last_ptr + state)
    out = row * K + index
    tl.store(drafts_ptr + out, tl.where(drafted, tokens.to(tl.int64), last), mask=index < K)
    tl.store(chances_ptr + out, tl.where(drafted, kept / tried, 0.0), mask=index < K)
    tl.store(table_ptr + state * 4 + 2, match)
    tl.store(table_ptr + state * 4 + 3, tl.sum(drafted.to(tl.int32), axis=0))


@triton.jit
def learn_kernel(
    states_ptr,
    num_sampled_ptr,
    num_rejected_ptr,
    table_ptr,
    counts_ptr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    MAX_MATCH: tl.constexpr,
):
    """Count the verified tokens of the last drafts: those accepted, and the first that was not."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(states_ptr + row).to(tl.int64)
    num_sampled = tl.load(num_sampled_ptr + row)
    accepted = num_sampled - 1
    verified = accepted + tl.load(num_rejected_ptr + row)
    match = tl.load(table_ptr + state * 4 + 2)
    num_drafted = tl.minimum(tl.load(table_ptr + state * 4 + 3), verified)
    num_tried = tl.where(match > 0, tl.minimum(num_drafted, accepted + 1), 0)
    index = tl.arange(0, K_BLOCK)
    matched = tl.minimum(match + index, MAX_MATCH)
    tl.atomic_add(counts_ptr + matched, 1.0, mask=index < num_tried)
    num_kept = tl.minimum(num_tried, accepted)
    tl.atomic_add(counts_ptr + MAX_MATCH + 1 + matched, 1.0, mask=index < num_kept)


@triton.jit
def weigh_kernel(
    ends_ptr,
    stride,
    states_ptr,
    lengths_ptr,
    num_sampled_ptr,
    table_ptr,
    both_ptr,  # int32 [max_num_reqs, 2, K]: the last drafts, looked up and of the head
    margins_ptr,  # int32 [MAX_MATCH + 1]
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Add to the margins how the last drafts, verified or not, compare with what came."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(states_ptr + row).to(tl.int64)
    num_sampled = tl.load(num_sampled_ptr + row)
    match = tl.load(table_ptr + state * 4 + 2)
    index = tl.arange(0, K_BLOCK)
    num_known = tl.where(match > 0, tl.minimum(num_sampled, K), 0)
    first = tl.load(lengths_ptr + state) - num_sampled
    came = tl.load(ends_ptr + state * stride + first + index, mask=index < num_known, other=-1)
    drafts = both_ptr + state * 2 * K + index
    found = tl.load(drafts, mask=index < num_known, other=-2)
    head = tl.load(drafts + K, mask=index < num_known, other=-2)
    found_right = tl.cumsum((found != came).to(tl.int32), axis=0) == 0
    head_right = tl.cumsum((head != came).to(tl.int32), axis=0) == 0
    more = tl.sum(found_right.to(tl.int32), axis=0) - tl.sum(head_right.to(tl.int32), axis=0)
    tl.atomic_add(margins_ptr + match, more)


@triton.jit
def choose_kernel(
    states_ptr,
    table_ptr,
    both_ptr,
    margins_ptr,
    found_ptr,  # int64 [num_reqs, K]
    found_chances_ptr,  # float32 [num_reqs, K]
    head_ptr,  # int64 [num_reqs, K]
    head_stride,
    out_ptr,  # int64 [num_reqs, K]
    chances_ptr,  # float32 [num_reqs, K]: the chances of the head's tokens
    taken_ptr,  # int32 [max_num_reqs]
    num_drafts,  # of this step; the others of K are not verified
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Choose the looked-up draft if drafts like it were right more often, else the head's draft.

    A chosen draft that is shorter than the head's is completed with the head's tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(states_ptr + row).to(tl.int64)
    match = tl.load(table_ptr + state * 4 + 2)
    num_found = tl.load(table_ptr + state * 4 + 3)
    margin = tl.load(margins_ptr + match)
    is_taken = tl.where((match > 0) & (num_found > 0) & (margin > 0), 1, 0)
    index = tl.arange(0, K_BLOCK)
    inside = index < K
    found = tl.load(found_ptr + row * K + index, mask=inside, other=0)
    head = tl.load(head_ptr + row * head_stride + index, mask=inside, other=0)
    mixed = tl.where(index < num_found, found, head)
    both = both_ptr + state * 2 * K + index
    tl.store(both, tl.where(index < num_drafts, mixed, -2).to(tl.int32), mask=inside)
    tl.store(both + K, tl.where(index < num_drafts, head, -2).to(tl.int32), mask=inside)
    tl.store(out_ptr + row * K + index, tl.where(is_taken > 0, mixed, head), mask=inside)
    num_taken = num_found * is_taken
    chances = tl.load(found_chances_ptr + row * K + index, mask=inside, other=0.0)
    tl.store(chances_ptr + row * K + index, chances, mask=index < num_taken)
    tl.store(table_ptr + state * 4 + 3, num_taken)
    tl.store(taken_ptr + state, is_taken)
