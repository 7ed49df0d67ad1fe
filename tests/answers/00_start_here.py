"""Right answers of lab 00, written differently from the solutions."""

ANSWERS = {
    "masked_mean": [
        '''
def masked_mean(tokens, real):
    """Sentence by sentence, picking the real tokens."""
    rows = []
    for sentence, keep in zip(tokens, real):
        rows.append(sentence[keep].mean(0) if keep.any() else torch.zeros_like(sentence[0]))
    return torch.stack(rows)
''',
        '''
def masked_mean(tokens, real):
    """Weights that sum to one, and a matrix product."""
    weights = real.to(tokens.dtype)
    weights = weights / torch.maximum(weights.sum(1, keepdim=True), torch.ones_like(weights[:, :1]))
    return torch.bmm(weights.unsqueeze(1), tokens).squeeze(1)
''',
        '''
def masked_mean(tokens, real):
    """Zeros in place of the padding, NaN turned into zeros."""
    kept = torch.where(real.unsqueeze(-1), tokens, 0.0)
    return torch.nan_to_num(kept.sum(1) / real.sum(1).unsqueeze(-1))
''',
    ],
    "attention_scores": [
        '''
def attention_scores(queries, keys):
    """A batched matrix product."""
    return torch.matmul(queries, keys.transpose(2, 3)) * queries.size(3) ** -0.5
''',
        '''
def attention_scores(queries, keys):
    """One dot product after another."""
    batch, heads, count, dim = queries.shape
    scores = queries.new_zeros(batch, heads, count, keys.shape[2])
    for b in range(batch):
        for h in range(heads):
            for i, query in enumerate(queries[b, h]):
                for j, key in enumerate(keys[b, h]):
                    scores[b, h, i, j] = torch.dot(query, key) / dim ** 0.5
    return scores
''',
        '''
def attention_scores(queries, keys):
    """Broadcast and sum; the scale shared between the two."""
    root = queries.shape[-1] ** 0.25
    return ((queries / root).unsqueeze(3) * (keys / root).unsqueeze(2)).sum(-1)
''',
    ],
    "split_heads": [
        '''
def split_heads(hidden, heads):
    """Chunks, stacked on a new axis."""
    return torch.stack(torch.chunk(hidden, heads, dim=-1), dim=1)
''',
        '''
def split_heads(hidden, heads):
    """Slices copied one by one."""
    batch, length, width = hidden.shape
    dim = width // heads
    out = hidden.new_empty(batch, heads, length, dim)
    for h in range(heads):
        out[:, h] = hidden[:, :, h * dim:(h + 1) * dim]
    return out
''',
        '''
def split_heads(hidden, heads):
    """einops, as hint 2 says."""
    import einops
    return einops.rearrange(hidden, "b l (h d) -> b h l d", h=heads)
''',
        '''
def split_heads(hidden, heads):
    """unflatten and permute."""
    return hidden.unflatten(2, (heads, -1)).permute(0, 2, 1, 3).contiguous()
''',
    ],
    "timed": [
        '''
def timed(work, synchronize, clock, warmup, repeats):
    """The median by hand; synchronizing on both sides."""
    for _ in range(warmup):
        work()
    seconds = []
    while len(seconds) < repeats:
        synchronize()
        begin = clock()
        work()
        synchronize()
        seconds.append(clock() - begin)
    seconds.sort()
    return (seconds[(repeats - 1) // 2] + seconds[repeats // 2]) / 2
''',
        '''
def timed(work, synchronize, clock, warmup, repeats):
    """All runs timed, the first ones thrown away."""
    def once():
        synchronize()
        begin = clock()
        work()
        synchronize()
        return clock() - begin
    times = [once() for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])
''',
        '''
def timed(work, synchronize, clock, warmup, repeats):
    """torch's quantile, which takes the mean of the middle two."""
    [work() for _ in range(warmup)]
    synchronize()
    stamps = [clock()]
    for _ in range(repeats):
        work()
        synchronize()
        stamps.append(clock())
    return torch.tensor(stamps, dtype=torch.float64).diff().quantile(0.5).item()
''',
    ],
    "best_match": [
        '''
def best_match(queries, documents, rows):
    """Blocks written into one result."""
    best = torch.empty(queries.shape[0], dtype=queries.dtype, device=queries.device)
    for start in range(0, queries.shape[0], rows):
        best[start:start + rows] = torch.max(queries[start:start + rows] @ documents.T, dim=1).values
    return best
''',
        '''
def best_match(queries, documents, rows):
    """One query at a time, whatever `rows` allows."""
    return torch.stack([torch.mv(documents, query).max() for query in queries])
''',
        '''
def best_match(queries, documents, rows):
    """Blocks of documents and a running maximum: as many similarities, the other way round."""
    best = torch.full_like(queries[:, 0], -math.inf)
    for block in documents.split(rows):
        best = torch.maximum(best, torch.einsum("qd,kd->qk", queries, block).max(1).values)
    return best
''',
    ],
    "add_vectors": [
        '''
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Pointers moved to the tile first, the rest counted down."""
    first = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = count - first
    total = tl.load(x_ptr + first + lane, mask=lane < left, other=0.0)
    total += tl.load(y_ptr + first + lane, mask=lane < left, other=0.0)
    tl.store(out_ptr + first + lane, total, mask=lane < left)


def add_vectors(x, y, out, block):
    count = x.shape[0]
    add_kernel[((count + block - 1) // block, 1, 1)](x, y, out, count, block)
''',
        '''
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Few programs, each striding over the tiles."""
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        offsets = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < count, other=0.0)
        y = tl.load(y_ptr + offsets, mask=offsets < count, other=0.0)
        tl.store(out_ptr + offsets, x + y, mask=offsets < count)


def add_vectors(x, y, out, block):
    add_kernel[lambda options: (2,)](x, y, out, len(x), BLOCK=block)
''',
    ],
    "add_vectors_twin": [
        '''
def add_vectors_twin(x, y, out, block):
    """Chunks of views."""
    for left, right, target in zip(x.split(block), y.split(block), out.split(block)):
        torch.add(left, right, out=target)
''',
        '''
def add_vectors_twin(x, y, out, block):
    """Offsets and a mask, as the kernel has them."""
    for program in range(-(-len(x) // block)):
        offsets = program * block + torch.arange(block, device=x.device)
        offsets = offsets[offsets < len(x)]
        out[offsets] = x[offsets] + y[offsets]
''',
        '''
def add_vectors_twin(x, y, out, block):
    """Tiles collected, joined and copied."""
    out.copy_(torch.cat([x[i:i + block] + y[i:i + block] for i in range(0, x.shape[0], block)]))
''',
    ],
    "row_sum": [
        '''
@triton.jit
def row_sum_kernel(x_ptr, out_ptr, row_stride, columns, BLOCK: tl.constexpr):
    """A number for a total: every tile is summed at once."""
    x_ptr += tl.program_id(0) * row_stride
    total = 0.0
    for tile in range(tl.cdiv(columns, BLOCK)):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + lane, mask=lane < columns, other=0.0).to(tl.float32), axis=0)
    tl.store(out_ptr + tl.program_id(0), total)


def row_sum(x, out, block):
    row_sum_kernel[(len(x), 1)](x, out, x.stride(0), x.size(1), block)
''',
        '''
@triton.jit
def row_sum_kernel(x_ptr, out_ptr, row_stride, columns, BLOCK: tl.constexpr):
    """The whole row as one wide tile, which the launcher sizes."""
    lane = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * row_stride + lane, mask=lane < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(x.to(tl.float32)))


def row_sum(x, out, block):
    row_sum_kernel[(x.shape[0],)](x, out, x.stride()[0], x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
''',
    ],
    "row_sum_twin": [
        '''
def row_sum_twin(x, out, block):
    """split and Python's sum."""
    for i, row in enumerate(x):
        out[i] = sum(tile.sum(dtype=torch.float32) for tile in row.split(block))
''',
        '''
def row_sum_twin(x, out, block):
    """A tile of totals, zeros where the row has ended."""
    for r in range(x.shape[0]):
        totals = torch.zeros(block, dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[1], block):
            tile = x[r, start:start + block].to(torch.float32)
            totals[:tile.numel()] += tile
        out[r] = totals.sum()
''',
    ],
    "tiled_matmul": [
        '''
@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, m, n, k, a_row, a_column, b_row, b_column, BLOCK: tl.constexpr):
    """Pointers that walk; masks counted down; the total handed to tl.dot."""
    lane = tl.arange(0, BLOCK)
    i, j = tl.program_id(0) * BLOCK + lane, tl.program_id(1) * BLOCK + lane
    a_tile = a_ptr + i[:, None] * a_row + lane[None, :] * a_column
    b_tile = b_ptr + lane[:, None] * b_row + j[None, :] * b_column
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(tl.cdiv(k, BLOCK)):
        left = k - step * BLOCK
        a = tl.load(a_tile, mask=(i[:, None] < m) & (lane[None, :] < left), other=0.0)
        b = tl.load(b_tile, mask=(lane[:, None] < left) & (j[None, :] < n), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_tile += BLOCK * a_column
        b_tile += BLOCK * b_row
    tl.store(out_ptr + i[:, None] * n + j[None, :], total.to(out_ptr.dtype.element_ty),
             mask=(i[:, None] < m) & (j[None, :] < n))


def tiled_matmul(a, b, out, block):
    m, n = out.shape
    grid = (-(-m // block), -(-n // block), 1)
    matmul_kernel[grid](a, b, out, m, n, a.shape[1], *a.stride(), *b.stride(), block)
''',
        '''
@triton.jit
def outer_kernel(a_ptr, b_ptr, out_ptr, m, n, k, a_row, a_column, b_row, b_column, BLOCK: tl.constexpr):
    """No tl.dot: one column of a times one row of b after another; a flat grid."""
    across = tl.cdiv(n, BLOCK)
    i = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(0, k):
        column = tl.load(a_ptr + i * a_row + step * a_column, mask=i < m, other=0.0).to(tl.float32)
        row = tl.load(b_ptr + step * b_row + j * b_column, mask=j < n, other=0.0).to(tl.float32)
        total += column[:, None] * row[None, :]
    tl.store(out_ptr + i[:, None] * n + j[None, :], total, mask=(i < m)[:, None] & (j < n)[None, :])


def tiled_matmul(a, b, out, block):
    (m, k), n = a.shape, b.shape[1]
    programs = triton.cdiv(m, block) * triton.cdiv(n, block)
    outer_kernel[(programs,)](a, b, out, m, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1), BLOCK=block)
''',
    ],
    "tiled_matmul_twin": [
        '''
def tiled_matmul_twin(a, b, out, block):
    """Strips of out, split again; the products of tiles added with sum."""
    for strip, target in zip(a.split(block), out.split(block)):
        for right, tile in zip(b.split(block, dim=1), target.split(block, dim=1)):
            pairs = zip(strip.split(block, dim=1), right.split(block))
            tile.copy_(sum(torch.einsum("mk,kn->mn", x.to(torch.float32), y.to(torch.float32)) for x, y in pairs))
''',
        '''
def tiled_matmul_twin(a, b, out, block):
    """Totals added in place, programs numbered as in the kernel."""
    m, n = out.shape
    down, across = -(-m // block), -(-n // block)
    for program in range(down * across):
        i, j = program // across * block, program % across * block
        left, right = a[i:i + block], b[:, j:j + block]
        total = torch.zeros(left.shape[0], right.shape[1], device=a.device)
        for start in range(0, a.shape[1], block):
            total.addmm_(left[:, start:start + block].float(), right[start:start + block].float())
        out[i:i + block, j:j + block].copy_(total)
''',
    ],
}

VARIANT_ANSWERS = {
    "split_heads": {
        "heads=turns": '''
def split_heads(hidden, heads):
    """Every head takes every heads-th number."""
    return torch.stack([hidden[:, :, first::heads] for first in range(heads)], dim=1)
''',
    },
}
