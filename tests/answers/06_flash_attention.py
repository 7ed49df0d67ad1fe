"""Right answers of lab 06 that are written differently from the solution: no check may refuse one."""

TILED = """
def tiled_forward(q, k, v, causal, block_q, block_k):
    heads, queries, dim = q.shape
    keys, base = k.shape[1], {base}
    out, lse = torch.zeros_like(q), torch.zeros(heads, queries, device=q.device)
    for head in range(heads):
        for i in range(0, queries, block_q):
            rows = range(i, min(i + block_q, queries))
            peak = torch.full((len(rows), 1), -1e30, device=q.device)
            total, acc = torch.zeros_like(peak), torch.zeros(len(rows), dim, device=q.device)
            for j in range(0, keys, block_k):
                if causal and j > rows[-1] + keys - queries:
                    break
                scores = q[head, i : i + block_q].float() @ k[head, j : j + block_k].float().mT * dim**-0.5
                if causal:
                    hidden = torch.ones_like(scores, dtype=torch.bool).triu(i - j + keys - queries + 1)
                    scores[hidden] = -math.inf
                new = torch.maximum(peak, scores.amax(1, keepdim=True))
                acc, total, peak = acc * (peak - new).exp(), total * (peak - new).exp(), new
                weights = (scores - peak).exp()
                acc += weights @ v[head, j : j + block_k].float()
                total += weights.sum(1, keepdim=True)
            seen = (total > 0)[:, 0]
            acc[seen] /= total[seen]
            out[head, i : i + block_q] = acc
            lse[head, i : i + block_q] = torch.where(seen, (peak + total.log())[:, 0] / base, -math.inf)
    return out, lse
"""

TILED_BY_MERGING = '''
def tiled_forward(q, k, v, causal, block_q, block_k):
    queries, keys = q.shape[1], k.shape[1]

    def one_tile(i, j):
        """Output and log-sum-exp of one tile, base 2 inside."""
        scores = torch.einsum("hqd,hkd->hqk", q[:, i : i + block_q].float(), k[:, j : j + block_k].float())
        scores = scores * (math.log2(math.e) / math.sqrt(q.shape[2]))
        if causal:
            row = torch.arange(i, i + scores.shape[1], device=q.device).view(-1, 1)
            key = torch.arange(j, j + scores.shape[2], device=q.device).view(1, -1)
            scores = torch.where(key - row <= keys - queries, scores, -math.inf)
        peak = scores.max(dim=2, keepdim=True).values.clamp(min=-1e30)
        weights = torch.exp2(scores - peak)
        total = weights.sum(dim=2, keepdim=True)
        return weights @ v[:, j : j + block_k].float() / total.clamp(min=1e-30), (peak + total.log2()).squeeze(2)

    outs, sums = [], []
    for i in range(0, queries, block_q):
        out, lse = one_tile(i, 0)
        for j in range(block_k, keys, block_k):
            more, lse_more = one_tile(i, j)
            both = torch.logaddexp2(lse, lse_more)
            safe = torch.nan_to_num(both, neginf=0.0)
            out = out * torch.exp2(lse - safe)[..., None] + more * torch.exp2(lse_more - safe)[..., None]
            lse = both
        outs.append(out.to(q.dtype))
        sums.append(lse * {factor})
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)
'''

FORWARD_SIGNATURE = """(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_head, q_row, q_dim, k_head, k_row, k_dim, v_head, v_row, v_dim, out_head, out_row, out_dim,
    queries, keys, group, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
)"""

LAUNCH = """
    strides = [s for x in (q, k, v, out) for s in x.stride()]
    queries, keys = q.size(1), k.size(1)
    flash_forward_kernel[(-(-queries // block_q), q.size(0))](
        q, k, v, out, lse, *strides, queries, keys, q.size(0) // k.size(0), q.size(2) ** -0.5,
        CAUSAL=causal, DIM=q.size(2), BLOCK_Q=block_q, BLOCK_K=block_k)
"""

ANSWERS = {
    "counted_attention": [
        """
def counted_attention(q, k, v, causal):
    heads, queries, dim = q.shape
    keys = k.shape[1]
    scores = torch.einsum("hqd,hkd->hqk", q, k) * dim**-0.5
    if causal:
        position = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
        scores = torch.where(torch.arange(keys, device=q.device) <= position, scores, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    step_1 = heads * (queries * dim + keys * dim + queries * keys)
    step_2 = 2 * heads * queries * keys
    step_3 = heads * (queries * keys + keys * dim + queries * dim)
    return torch.bmm(weights, v), (step_1 + step_2 + step_3) * torch.finfo(q.dtype).bits // 8
""",
        """
def counted_attention(q, k, v, causal):
    rows, keys, queries = [], k.shape[1], q.shape[1]
    for i in range(queries):
        last = i + keys - queries + 1 if causal else keys
        scores = (k[:, :last] @ q[:, i, :, None])[..., 0] / math.sqrt(q.shape[2])
        rows.append((scores.softmax(-1)[:, None] @ v[:, :last])[:, 0])
    size = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}[q.dtype]
    square = 4 * len(q) * queries * keys
    return torch.stack(rows, dim=1), size * (square + 2 * (q.numel() + k.numel()))
""",
    ],
    "online_softmax": [
        """
def online_softmax(blocks):
    state = None
    for scores, values in blocks:
        top = scores.max(dim=1).values
        base = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        weights = (scores - base[:, None]).exp()
        lse = base + weights.sum(1).log()
        out = weights @ values / weights.sum(1, keepdim=True).clamp(min=1e-30)
        if state is None:
            state = out, lse
            continue
        both = torch.logaddexp(state[1], lse)
        safe = torch.nan_to_num(both, neginf=0.0)
        state = (state[0] * (state[1] - safe).exp()[:, None] + out * (lse - safe).exp()[:, None], both)
    return state
""",
        """
def online_softmax(blocks):
    peak = None
    for scores, values in blocks:
        for key in range(scores.shape[1]):
            s = scores[:, key]
            if peak is None:
                peak, total = torch.full_like(s, -1e30), torch.zeros_like(s)
                out = torch.zeros(len(s), values.shape[1], device=s.device)
            new = torch.maximum(peak, s)
            total = total * torch.exp(peak - new) + torch.exp(s - new)
            out = out * torch.exp(peak - new)[:, None] + torch.exp(s - new)[:, None] * values[key]
            peak = new
    seen = total > 0
    return torch.where(seen[:, None], out / total[:, None], 0.0), torch.where(seen, peak + total.log(), -math.inf)
""",
    ],
    "merge_partials": [
        """
def merge_partials(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
    return (lse_a - safe).exp().unsqueeze(-1) * out_a + (lse_b - safe).exp().unsqueeze(-1) * out_b, lse
""",
        """
def merge_partials(out_a, lse_a, out_b, lse_b):
    share = torch.sigmoid(torch.nan_to_num(lse_a - lse_b, nan=0.0))[..., None]
    high, low = torch.maximum(lse_a, lse_b), torch.minimum(lse_a, lse_b)
    gap = torch.nan_to_num(low - high, nan=0.0, neginf=-1e30)
    return share * out_a + (1 - share) * out_b, high + torch.log1p(torch.exp(gap))
""",
    ],
    "tiled_forward": [TILED.replace("{base}", "1.0"), TILED_BY_MERGING.replace("{factor}", "math.log(2)")],
    "flash_kernel": [
        f"""
@triton.jit
def flash_forward_kernel{FORWARD_SIGNATURE}:
    head = tl.program_id(1)
    kv_head = head // group
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    d = tl.arange(0, DIM)[None, :]
    q = tl.load(q_ptr + head * q_head + i * q_row + d * q_dim, mask=i < queries, other=0.0)
    offset = keys - queries
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) + 1) * BLOCK_Q + offset)
    m = tl.full([BLOCK_Q, 1], -1e30, tl.float32)
    l = tl.zeros([BLOCK_Q, 1], tl.float32)
    o = tl.zeros([BLOCK_Q, DIM], tl.float32)
    for j0 in range(0, end, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        k = tl.load(k_ptr + kv_head * k_head + j[None, :] * k_row + tl.trans(d) * k_dim,
                    mask=j[None, :] < keys, other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634)
        s += tl.where(j[None, :] < keys, 0.0, float("-inf"))
        if CAUSAL:
            s += tl.where(j[None, :] > i + offset, float("-inf"), 0.0)
        m_new = tl.maximum(m, tl.max(s, 1)[:, None])
        p = tl.exp2(s - m_new)
        a = tl.exp2(m - m_new)
        l = l * a + tl.sum(p, 1)[:, None]
        v = tl.load(v_ptr + kv_head * v_head + j[:, None] * v_row + d * v_dim, mask=j[:, None] < keys, other=0.0)
        o = tl.dot(p.to(v.dtype), v, o * a, input_precision="ieee")
        m = m_new
    o = tl.where(l > 0, o / tl.maximum(l, 1e-30), 0.0)
    tl.store(out_ptr + head * out_head + i * out_row + d * out_dim, o, mask=i < queries)
    lse = tl.where(l > 0, (m + tl.log2(tl.maximum(l, 1e-30))) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + head * queries + i, lse, mask=i < queries)


def flash_kernel(q, k, v, out, lse, causal, block_q, block_k):{LAUNCH}
""",
        f"""
@triton.jit
def tile_of(ptr, head, rows, count, head_stride, row_stride, dim_stride, DIM: tl.constexpr):
    at = ptr + head * head_stride + rows[:, None] * row_stride + tl.arange(0, DIM)[None, :] * dim_stride
    return tl.load(at, mask=(rows < count)[:, None], other=0.0)


@triton.jit
def flash_forward_kernel{FORWARD_SIGNATURE}:
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    q = tile_of(q_ptr, head, rows, queries, q_head, q_row, q_dim, DIM).to(tl.float32) * scale
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
    for tile in range(tl.cdiv(keys, BLOCK_K)):
        columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k = tile_of(k_ptr, head // group, columns, keys, k_head, k_row, k_dim, DIM).to(tl.float32)
        v = tile_of(v_ptr, head // group, columns, keys, v_head, v_row, v_dim, DIM).to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        last = rows * 0 + keys - 1
        if CAUSAL:
            last = rows + keys - queries
        hidden = (columns[None, :] > last[:, None]) | (columns[None, :] >= keys)
        scores = tl.where(hidden, float("-inf"), scores)
        new = tl.maximum(tl.maximum(peak, tl.max(scores, 1)), -1e30)
        weights = tl.exp(scores - new[:, None])
        acc *= tl.exp(peak - new)[:, None]
        total *= tl.exp(peak - new)
        acc += tl.dot(weights, v, input_precision="ieee")
        total += tl.sum(weights, 1)
        peak = new
    blind = total == 0
    divisor = tl.where(blind, 1.0, total)
    at = out_ptr + head * out_head + rows[:, None] * out_row + tl.arange(0, DIM)[None, :] * out_dim
    tl.store(at, (acc / divisor[:, None]).to(out_ptr.dtype.element_ty), mask=(rows < queries)[:, None])
    lse = tl.where(blind, float("-inf"), peak + tl.log(divisor))
    tl.store(lse_ptr + head * queries + rows, lse, mask=rows < queries)


def flash_kernel(q, k, v, out, lse, causal, block_q, block_k):{LAUNCH}
""",
    ],
    "flash_kernel_twin": [
        """
def flash_kernel_twin(q, k, v, out, lse, causal, block_q, block_k):
    heads, queries, dim = q.shape
    keys, group = k.shape[1], heads // k.shape[0]
    for head in range(heads):
        for i in range(0, queries, block_q):
            rows = torch.arange(i, min(i + block_q, queries), device=q.device)
            q_tile = q[head, i : i + block_q].float() * dim**-0.5
            peak = torch.full((len(rows),), -1e30, device=q.device)
            total, acc = torch.zeros_like(peak), torch.zeros_like(q_tile)
            for j in range(0, keys, block_k):
                scores = q_tile @ k[head // group, j : j + block_k].float().mT
                if causal:
                    columns = torch.arange(j, j + scores.shape[1], device=q.device)
                    scores = scores.masked_fill(columns[None] > rows[:, None] + keys - queries, -math.inf)
                new = torch.maximum(peak, scores.amax(1))
                weights = (scores - new[:, None]).exp()
                total = total * (peak - new).exp() + weights.sum(1)
                acc = acc * (peak - new).exp()[:, None] + weights @ v[head // group, j : j + block_k].float()
                peak = new
            seen = total > 0
            total = total.clamp(min=1e-30)
            out[head, i : i + block_q] = acc / total[:, None]
            lse[head, i : i + block_q] = torch.where(seen, peak + total.log(), -math.inf)
""",
        """
def flash_kernel_twin(q, k, v, out, lse, causal, block_q, block_k):
    queries, keys = q.shape[1], k.shape[1]
    for program in range(-(-queries // block_q) * len(q)):
        tile, head = divmod(program, len(q))
        row = tile * block_q + torch.arange(block_q, device=q.device)
        dims = torch.arange(q.shape[2], device=q.device)[None, :]
        real = (row < queries)[:, None]
        a = load(q, head * q.stride(0) + row[:, None] * q.stride(1) + dims * q.stride(2), real).float()
        kv_head = head * len(k) // len(q)
        lse_tile = torch.full((block_q,), -math.inf, device=q.device)
        out_tile = torch.zeros(block_q, q.shape[2], device=q.device)
        for j in range(0, keys, block_k):
            key = j + torch.arange(block_k, device=q.device)
            b = load(k, kv_head * k.stride(0) + key[:, None] * k.stride(1) + dims * k.stride(2), key[:, None] < keys)
            c = load(v, kv_head * v.stride(0) + key[:, None] * v.stride(1) + dims * v.stride(2), key[:, None] < keys)
            scores = a @ b.float().T / math.sqrt(q.shape[2])
            scores[:, key >= keys] = -math.inf
            if causal:
                scores[key[None, :] - row[:, None] > keys - queries] = -math.inf
            new = torch.logaddexp(lse_tile, torch.logsumexp(scores, 1))
            safe = torch.nan_to_num(new, neginf=0.0)
            out_tile = out_tile * (lse_tile - safe).exp()[:, None] + (scores - safe[:, None]).exp() @ c.float()
            lse_tile = new
        store(out, head * out.stride(0) + row[:, None] * out.stride(1) + dims * out.stride(2), out_tile, real)
        store(lse, head * queries + row, lse_tile, row < queries)
""",
    ],
    "flash_backward": [
        """
def flash_backward(q, k, v, out, lse, d_out, causal, block_q, block_k):
    scale, offset = q.shape[2] ** -0.5, k.shape[1] - q.shape[1]
    total = torch.einsum("hqd,hqd->hq", out.float(), d_out.float())
    dq = torch.zeros(q.shape, device=q.device)
    dk, dv = torch.zeros(k.shape, device=q.device), torch.zeros(v.shape, device=q.device)
    for head in range(len(q)):
        for i in range(0, q.shape[1], block_q):
            qi, do = q[head, i : i + block_q].float() * scale, d_out[head, i : i + block_q].float()
            safe = torch.nan_to_num(lse[head, i : i + block_q, None], neginf=0.0)
            share = torch.zeros_like(qi)
            for j in range(0, k.shape[1], block_k):
                kj, vj = k[head, j : j + block_k].float(), v[head, j : j + block_k].float()
                s = qi @ kj.mT
                if causal:
                    s = s.masked_fill(torch.ones_like(s).triu(i - j + offset + 1).bool(), -math.inf)
                p = (s - safe).exp()
                ds = p * (do @ vj.mT - total[head, i : i + block_q, None])
                share += ds @ kj
                dv[head, j : j + block_k] += p.mT @ do
                dk[head, j : j + block_k] += ds.mT @ qi
            dq[head, i : i + block_q] = share * scale
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
""",
        '''
def flash_backward(q, k, v, out, lse, d_out, causal, block_q, block_k):
    """Three passes: dv, then dk, then dq."""
    queries, keys, scale = q.shape[1], k.shape[1], 1 / math.sqrt(q.shape[2])

    def tile(i, j):
        qi, kj, do = q[:, i : i + block_q].float(), k[:, j : j + block_k].float(), d_out[:, i : i + block_q].float()
        p = torch.exp2((torch.einsum("hqd,hkd->hqk", qi, kj) * scale - lse[:, i : i + block_q, None]) / math.log(2))
        if causal:
            row = torch.arange(i, i + p.shape[1], device=q.device).view(-1, 1)
            key = torch.arange(j, j + p.shape[2], device=q.device)
            p = torch.where(key <= row + keys - queries, p, 0.0)
        delta = (out[:, i : i + block_q].float() * do).sum(-1, keepdim=True)
        dp = torch.einsum("hqd,hkd->hqk", do, v[:, j : j + block_k].float())
        return p, p * dp - p * delta, qi, kj, do

    rows, columns = range(0, queries, block_q), range(0, keys, block_k)
    dv = torch.cat([sum(p.mT @ do for p, _, _, _, do in (tile(i, j) for i in rows)) for j in columns], dim=1)
    dk = torch.cat([sum(ds.mT @ qi for _, ds, qi, _, _ in (tile(i, j) for i in rows)) for j in columns], dim=1)
    dq = torch.cat([sum(ds @ kj for _, ds, _, kj, _ in (tile(i, j) for j in columns)) for i in rows], dim=1)
    return (dq * scale).to(q.dtype), (dk * scale).to(q.dtype), dv.to(q.dtype)
''',
    ],
    "tile_plan": [
        """
def tile_plan(queries, keys, block_q, block_k):
    plan = []
    for i in range(math.ceil(queries / block_q)):
        rows = range(i * block_q, min((i + 1) * block_q, queries))
        full = visited = 0
        for j in range(math.ceil(keys / block_k)):
            columns = range(j * block_k, (j + 1) * block_k)
            full += all(c < keys and c <= r + keys - queries for r in rows for c in columns)
            visited += any(c < keys and c <= r + keys - queries for r in rows for c in columns)
        plan.append((full, visited))
    return plan
""",
        """
def tile_plan(queries, keys, block_q, block_k):
    def tiles(count, up):
        if count <= 0:
            return 0
        whole, rest = divmod(count, block_k)
        return whole + (1 if rest and up else 0)

    ends = list(range(block_q, queries, block_q)) + [queries]
    starts = [0] + ends[:-1]
    gap = keys - queries
    return [(tiles(start + gap + 1, False), tiles(end + gap, True)) for start, end in zip(starts, ends)]
""",
    ],
    "window_attention": [
        """
def window_attention(q, k, v, window, block):
    pieces, offset = [], k.shape[1] - q.shape[1]
    for i in range(0, q.shape[1], block):
        part = q[:, i : i + block] * q.shape[2] ** -0.5
        first = max(0, i + offset + 1 - window)
        last = i + offset + part.shape[1]
        mask = torch.ones(part.shape[1], last - first, dtype=torch.bool, device=q.device)
        mask = mask.tril(i + offset - first) & mask.triu(i + offset - first - window + 1)
        scores = torch.einsum("hqd,hkd->hqk", part, k[:, first:last]).masked_fill(~mask, float("-inf"))
        pieces.append(scores.softmax(-1) @ v[:, first:last])
    return torch.cat(pieces, dim=1)
""",
        """
def window_attention(q, k, v, window, block):
    out = torch.zeros_like(q)
    for i in range(q.shape[1]):
        last = i + k.shape[1] - q.shape[1] + 1
        near = range(last)[-window:]
        scores = (k[:, near[0] : last] @ q[:, i, :, None]).squeeze(-1) / math.sqrt(q.shape[2])
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        weights /= weights.sum(1, keepdim=True)
        out[:, i] = (weights[:, None] @ v[:, near[0] : last]).squeeze(1)
    return out
""",
    ],
    "chunked_attention": [
        """
def chunked_attention(q, k, v, causal, chunk):
    from torch.utils.checkpoint import checkpoint

    def attend(part, k, v, first):
        scores = torch.einsum("hqd,hkd->hqk", part, k) * part.shape[2] ** -0.5
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(hidden.triu(first + k.shape[1] - q.shape[1] + 1), float("-inf"))
        return torch.einsum("hqk,hkd->hqd", scores.softmax(-1), v)

    pieces = []
    for number, part in enumerate(q.split(chunk, dim=1)):
        pieces.append(checkpoint(attend, part, k, v, number * chunk, use_reentrant=False))
    return torch.cat(pieces, 1)
""",
        """
class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, last):
        ctx.save_for_backward(q, k, v)
        ctx.last = last
        return _Chunk.attend(q, k, v, last)

    @staticmethod
    def attend(q, k, v, last):
        # row r sees keys up to last + r; all of them where last is None
        scores = q @ k.mT / math.sqrt(q.shape[2])
        if last is not None:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(last + 1).bool(), -math.inf)
        return scores.softmax(2) @ v

    @staticmethod
    def backward(ctx, d_out):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _Chunk.attend(*inputs, ctx.last)
        return *torch.autograd.grad(out, inputs, d_out), None


def chunked_attention(q, k, v, causal, chunk):
    pieces, offset = [], k.shape[1] - q.shape[1]
    for i in range(0, q.shape[1], chunk):
        pieces.append(_Chunk.apply(q[:, i : i + chunk], k, v, i + offset if causal else None))
    return torch.cat(pieces, dim=1)
""",
    ],
    "backward_kernel": [
        """
@triton.jit
def flash_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, queries, keys, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, DIM)
    at_k = head * keys * DIM + j[:, None] * DIM + d[None, :]
    k = tl.load(k_ptr + at_k, mask=(j < keys)[:, None], other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at_k, mask=(j < keys)[:, None], other=0.0).to(tl.float32)
    sum_k = tl.zeros([BLOCK_K, DIM], tl.float32)
    sum_v = tl.zeros([BLOCK_K, DIM], tl.float32)
    for tile in range(tl.cdiv(queries, BLOCK_Q)):
        i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        at_q = head * queries * DIM + i[:, None] * DIM + d[None, :]
        q = tl.load(q_ptr + at_q, mask=(i < queries)[:, None], other=0.0).to(tl.float32)
        do = tl.load(d_out_ptr + at_q, mask=(i < queries)[:, None], other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + head * queries + i, mask=i < queries, other=float("inf"))
        delta = tl.load(delta_ptr + head * queries + i, mask=i < queries, other=0.0)
        st = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        seen = (j[:, None] < keys) & (i[None, :] < queries)
        if CAUSAL:
            seen = seen & (j[:, None] + queries <= i[None, :] + keys)
        pt = tl.where(seen, tl.exp(tl.where(seen, st - lse[None, :], 0.0)), 0.0)
        sum_v = tl.dot(pt, do, sum_v, input_precision="ieee")
        dst = pt * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        sum_k = tl.dot(dst, q, sum_k, input_precision="ieee")
        dq = tl.dot(tl.trans(dst), k, input_precision="ieee") * scale
        tl.atomic_add(dq_ptr + at_q, dq, mask=(i < queries)[:, None])
    tl.store(dk_ptr + at_k, sum_k * scale, mask=(j < keys)[:, None])
    tl.store(dv_ptr + at_k, sum_v, mask=(j < keys)[:, None])


def backward_kernel(q, k, v, d_out, lse, delta, dq, dk, dv, causal, block_q, block_k):
    flash_backward_kernel[(-(-k.size(1) // block_k), k.size(0))](
        q, k, v, d_out, lse, delta, dq, dk, dv, q.size(1), k.size(1), q.size(2) ** -0.5,
        CAUSAL=causal, DIM=q.size(2), BLOCK_Q=block_q, BLOCK_K=block_k)
""",
        """
@triton.jit
def keys_and_values(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, queries, keys, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FOR_QUERIES: tl.constexpr,
):
    # two passes over the tiles with one kernel: by keys for dk and dv, by queries for dq
    head = tl.program_id(1)
    d = tl.arange(0, DIM)[None, :]
    if FOR_QUERIES:
        i0 = tl.program_id(0) * BLOCK_Q
        acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
        steps = tl.cdiv(keys, BLOCK_K)
    else:
        j0 = tl.program_id(0) * BLOCK_K
        acc = tl.zeros([BLOCK_K, DIM], tl.float32)
        steps = tl.cdiv(queries, BLOCK_Q)
    acc_v = tl.zeros([BLOCK_K, DIM], tl.float32)
    for step in range(steps):
        if FOR_QUERIES:
            i = i0 + tl.arange(0, BLOCK_Q)
            j = step * BLOCK_K + tl.arange(0, BLOCK_K)
        else:
            i = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
            j = j0 + tl.arange(0, BLOCK_K)
        q_at = (head * queries + i[:, None]) * DIM + d
        k_at = (head * keys + j[:, None]) * DIM + d
        q = tl.load(q_ptr + q_at, mask=i[:, None] < queries, other=0.0)
        do = tl.load(do_ptr + q_at, mask=i[:, None] < queries, other=0.0)
        k = tl.load(k_ptr + k_at, mask=j[:, None] < keys, other=0.0)
        v = tl.load(v_ptr + k_at, mask=j[:, None] < keys, other=0.0)
        lse = tl.load(lse_ptr + head * queries + i, mask=i < queries, other=0.0)
        delta = tl.load(delta_ptr + head * queries + i, mask=i < queries, other=0.0)
        seen = (i[:, None] < queries) & (j[None, :] < keys)
        if CAUSAL:
            seen = seen & (j[None, :] - i[:, None] <= keys - queries)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.where(seen, tl.exp(s * scale - lse[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if FOR_QUERIES:
            acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        else:
            acc += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
            acc_v += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
    if FOR_QUERIES:
        rows = i0 + tl.arange(0, BLOCK_Q)
        tl.store(dq_ptr + (head * queries + rows[:, None]) * DIM + d, acc * scale, mask=rows[:, None] < queries)
    else:
        rows = j0 + tl.arange(0, BLOCK_K)
        tl.store(dk_ptr + (head * keys + rows[:, None]) * DIM + d, acc * scale, mask=rows[:, None] < keys)
        tl.store(dv_ptr + (head * keys + rows[:, None]) * DIM + d, acc_v, mask=rows[:, None] < keys)


def backward_kernel(q, k, v, d_out, lse, delta, dq, dk, dv, causal, block_q, block_k):
    for for_queries, tiles in ((False, -(-k.size(1) // block_k)), (True, -(-q.size(1) // block_q))):
        keys_and_values[(tiles, q.size(0))](
            q, k, v, d_out, lse, delta, dq, dk, dv, q.size(1), k.size(1), q.size(2) ** -0.5,
            causal, q.size(2), block_q, block_k, for_queries)
""",
    ],
    "backward_kernel_twin": [
        """
def backward_kernel_twin(q, k, v, d_out, lse, delta, dq, dk, dv, causal, block_q, block_k):
    heads, queries, dim = q.shape
    keys = k.shape[1]
    for head in range(heads):
        for j in range(0, keys, block_k):
            kj, vj = k[head, j : j + block_k].float(), v[head, j : j + block_k].float()
            sum_k, sum_v = torch.zeros_like(kj), torch.zeros_like(vj)
            for i in range(0, queries, block_q):
                qi, do = q[head, i : i + block_q].float(), d_out[head, i : i + block_q].float()
                p = (qi @ kj.mT * dim**-0.5 - lse[head, i : i + block_q, None]).exp()
                if causal:
                    p = p.masked_fill(torch.ones_like(p).triu(i - j + keys - queries + 1).bool(), 0.0)
                ds = p * (do @ vj.mT - delta[head, i : i + block_q, None]) * dim**-0.5
                sum_v += p.mT @ do
                sum_k += ds.mT @ qi
                dq[head, i : i + block_q] += ds @ kj
            dk[head, j : j + block_k] = sum_k
            dv[head, j : j + block_k] = sum_v
""",
        '''
def backward_kernel_twin(q, k, v, d_out, lse, delta, dq, dk, dv, causal, block_q, block_k):
    """By queries for dq, by keys for dk and dv, tile for tile."""
    heads, queries, dim = q.shape
    keys, scale = k.shape[1], dim**-0.5

    def tile(head, i, j):
        rows, columns = (torch.arange(a, a + n, device=q.device) for a, n in ((i, block_q), (j, block_k)))
        dims = torch.arange(dim, device=q.device)
        at_q = head * queries * dim + rows[:, None] * dim + dims
        at_k = head * keys * dim + columns[:, None] * dim + dims
        qi, do = (load(x, at_q, (rows < queries)[:, None]).float() for x in (q, d_out))
        kj, vj = (load(x, at_k, (columns < keys)[:, None]).float() for x in (k, v))
        row_lse, row_delta = (load(x, head * queries + rows, rows < queries)[:, None] for x in (lse, delta))
        seen = (rows < queries)[:, None] & (columns < keys)[None]
        if causal:
            seen = seen & (columns[None] - rows[:, None] <= keys - queries)
        p = torch.where(seen, torch.exp(qi @ kj.T * scale - row_lse), 0.0)
        ds = p * (do @ vj.T - row_delta) * scale
        return p, ds, qi, kj, do, at_q, at_k, (rows < queries)[:, None], (columns < keys)[:, None]

    for head in range(heads):
        for i in range(0, queries, block_q):
            share = 0.0
            for j in range(0, keys, block_k):
                _, ds, _, kj, _, at_q, _, real, _ = tile(head, i, j)
                share = share + ds @ kj
            store(dq, at_q, share, real)
        for j in range(0, keys, block_k):
            share_k = share_v = 0.0
            for i in range(0, queries, block_q):
                p, ds, qi, _, do, _, at_k, _, real = tile(head, i, j)
                share_k, share_v = share_k + ds.T @ qi, share_v + p.T @ do
            store(dk, at_k, share_k, real)
            store(dv, at_k, share_v, real)
''',
    ],
}

VARIANT_ANSWERS = {
    "counted_attention": {
        "scores=float32": """
def counted_attention(q, k, v, causal):
    scores = (q / math.sqrt(q.shape[2])) @ k.mT
    if causal:
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    outside = sum(x.numel() * x.element_size() for x in (q, q, k, v))
    return scores.softmax(2) @ v, outside + 16 * scores.numel()
""",
    },
    "tiled_forward": {
        "lse=base 2": TILED_BY_MERGING.replace("{factor}", "1.0"),
    },
}
