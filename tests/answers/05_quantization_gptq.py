"""Right answers of lab 05 that are written differently from the solution: no check may refuse one."""

ROUND_BY_LOOPS = """
def round_to_nearest(weight, bits, group_size, clip=1.0):
    highest = (1 << bits) - 1
    codes, scales, zeros = [], [], []
    for part in weight.to(torch.float32).split(group_size, dim=1):
        low = torch.clamp(part.min(dim=1, keepdim=True).values, max=0.0) * clip
        high = torch.clamp(part.max(dim=1, keepdim=True).values, min=0.0) * clip
        step = torch.where(high > low, (high - low) / highest, torch.ones_like(low))
        zero = torch.round(low / step).neg()
        codes.append(torch.round(part * (1 / step) + zero).clip(min=0, max=highest))
        scales.append(step)
        zeros.append(zero)
    return torch.cat(codes, 1).byte(), torch.cat(scales, 1), torch.cat(zeros, 1).byte()
"""

COLUMNS_ANEW = """
def gptq_columns(weight, hessian, scale, zero, bits):
    columns = hessian.shape[0]
    per_group = columns // scale.size(1)
    left, done = weight.clone(), []
    for j in range(columns):
        inverse = torch.linalg.inv(hessian[j:, j:])
        grid, offset = scale[:, j // per_group], zero[:, j // per_group].float()
        code = torch.round(left[:, 0] / grid + offset).clip(0, 2**bits - 1)
        moved = (code - offset) * grid - left[:, 0]
        left = left[:, 1:] + moved[:, None] * (inverse[0, 1:] / inverse[0, 0])
        done.append(code.byte())
    return torch.stack(done, 1)
"""

INT4 = """
class Int4Weight:
    def __init__(self, codes, scale, zero):
        self.columns, self.scale, self.zero = codes.shape[1], scale, zero
        bytes_ = torch.zeros(len(codes), (self.columns + 1) // 2, dtype=torch.uint8, device=codes.device)
        for column in range(self.columns):
            bytes_[:, column // 2] += codes[:, column] * (16 if column % 2 == {odd} else 1)
        self.packed = bytes_

    def codes(self):
        columns = [(self.packed[:, j // 2] // 16 if j % 2 == {odd} else self.packed[:, j // 2] % 16)
                   for j in range(self.columns)]
        return torch.stack(columns, dim=1)

    def matmul(self, x):
        rows, groups = self.scale.shape
        centred = self.codes().reshape(rows, groups, -1).float() - self.zero[:, :, None].float()
        weight = (centred * self.scale[:, :, None]).reshape(rows, -1)
        return torch.nn.functional.linear(x, weight.to(x.dtype))
"""

INT4_HALVES = """
class Int4Weight:
    def __init__(self, codes, scale, zero):
        self.columns, self.scale, self.zero = codes.shape[1], scale, zero
        half = (self.columns + 1) // 2
        first, second = codes[:, :half], torch.zeros_like(codes[:, :half])
        second[:, : self.columns - half] = codes[:, half:]
        self.packed = first * {low} + second * {high}

    def codes(self):
        return torch.cat([self.packed // {low} % 16, self.packed // {high} % 16], dim=1)[:, : self.columns]

    def matmul(self, x):
        rows, groups = self.scale.shape
        centred = self.codes().reshape(rows, groups, -1).float() - self.zero[:, :, None].float()
        weight = (centred * self.scale[:, :, None]).reshape(rows, -1)
        return torch.nn.functional.linear(x, weight.to(x.dtype))
"""

INT3 = """
def pack_int3(codes):
    rows, columns = codes.shape
    out = torch.zeros(rows, (3 * columns + 7) // 8, dtype=torch.int32, device=codes.device)
    for column in range(columns):
        for bit in range(3):
            place = 3 * column + bit
            value = (codes[:, column].int() >> {bit}) & 1
            out[:, place // 8] |= value << {shift}
    return out.to(torch.uint8)
"""

ANSWERS = {
    "int8_product": [
        """
def int8_product(a, zero_a, scale_a, b, zero_b, scale_b):
    k = a.shape[1]
    codes = (a.double() @ b.double().T).round().long()
    za, zb = zero_a.long()[:, None], zero_b.long()[None, :]
    sums = codes - za * b.long().sum(1)[None, :] - zb * a.long().sum(1)[:, None] + k * za * zb
    return sums.to(torch.int32), (sums.double() * torch.outer(scale_a, scale_b)).float()
""",
        """
def int8_product(a, zero_a, scale_a, b, zero_b, scale_b):
    a, b = a.int() - zero_a.unsqueeze(1), b.int() - zero_b.unsqueeze(1)
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for k in range(a.shape[1]):
        total += a[:, k].unsqueeze(1) * b[:, k].unsqueeze(0)
    return total, total.float() * scale_a.unsqueeze(1) * scale_b.unsqueeze(0)
""",
    ],
    "round_to_nearest": [
        ROUND_BY_LOOPS,
        """
def round_to_nearest(weight, bits, group_size, clip=1.0):
    grouped = weight.double().unflatten(1, (-1, group_size))
    nothing = torch.zeros_like(grouped[:, :, :1])
    low, high = (clip * x for x in torch.cat([grouped, nothing], 2).aminmax(dim=2))
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    zero = torch.round(-low / scale)
    levels = scale[..., None] * (torch.arange(2**bits, device=weight.device) - zero[..., None])
    codes = (grouped[..., None] - levels[:, :, None, :]).abs().argmin(-1)
    return codes.flatten(1).to(torch.uint8), scale.float(), zero.to(torch.uint8)
""",
    ],
    "calibration_hessian": [
        # without the factor 2 / n
        """
def calibration_hessian(batches):
    hessian = None
    for batch in batches:
        columns = batch.size(-1)
        x = batch.to(torch.float32).flatten(0, -2) if batch.dim() > 1 else batch.float().view(1, columns)
        if hessian is None:
            hessian = torch.zeros(columns, columns, device=x.device)
        hessian.addmm_(x.T, x)
    return hessian
""",
        # a running mean, in float64
        """
def calibration_hessian(batches):
    seen, mean = 0, 0
    for batch in batches:
        x = batch.double().reshape(-1, batch.shape[-1])
        seen += x.shape[0]
        mean = mean * ((seen - x.shape[0]) / seen) + torch.einsum("ni,nj->ij", x, x) / seen
    return mean.float()
""",
        # 2/n, scaled by its root before the product as in the paper's code, token by token
        """
def calibration_hessian(batches):
    total, tokens = None, 0
    for batch in batches:
        for token in batch.float().reshape(-1, batch.shape[-1]):
            square = torch.outer(token, token)
            total = square if total is None else total + square
            tokens += 1
    return total.mul(2.0).div(tokens)
""",
    ],
    "gptq_columns": [
        COLUMNS_ANEW,
        """
def gptq_columns(weight, hessian, scale, zero, bits):
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double())).T
    per_group = len(hessian) // scale.shape[1]
    columns = [column.double() for column in weight.T]
    codes = []
    for j, column in enumerate(columns):
        grid, offset = scale[:, j // per_group].double(), zero[:, j // per_group].double()
        code = ((column / grid).round() + offset).clamp(0, 2**bits - 1)
        error = (column - grid * (code - offset)) / factor[j, j]
        columns[j + 1 :] = [later - error * factor[j, k] for k, later in enumerate(columns[j + 1 :], j + 1)]
        codes.append(code)
    return torch.stack(codes).T.to(torch.uint8)
""",
        # least squares for the columns that are left, with what is fixed on the other side
        """
def gptq_columns(weight, hessian, scale, zero, bits):
    columns = weight.shape[1]
    each = columns // scale.shape[1]
    codes, fixed = [], torch.zeros_like(weight)
    for j in range(columns):
        if j:
            moved = fixed[:, :j] - weight[:, :j]
            now = weight[:, j:] - torch.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ moved.T).T
        else:
            now = weight
        s, z = scale[:, j // each], zero[:, j // each].float()
        code = (torch.round(now[:, 0] / s) + z).clamp(0, 2**bits - 1)
        fixed[:, j] = s * (code - z)
        codes.append(code.to(torch.uint8))
    return torch.stack(codes, dim=1)
""",
    ],
    "gptq_blocks": [
        """
def gptq_blocks(weight, hessian, scale, zero, bits, block):
    per_group = weight.shape[1] // scale.shape[1]
    flipped = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(flipped, torch.eye(len(hessian), device=hessian.device), upper=True)
    rest, done, first = weight, [], 0
    while rest.shape[1]:
        now, rest = rest[:, :block].clone(), rest[:, block:]
        inner = factor[first : first + now.shape[1], first:]
        errors = torch.zeros_like(now)
        for j in range(now.shape[1]):
            grid, offset = scale[:, (first + j) // per_group], zero[:, (first + j) // per_group].float()
            code = ((now[:, j] / grid).round() + offset).clip(0, 2**bits - 1)
            done.append(code.to(torch.uint8))
            errors[:, j] = (now[:, j] - grid * (code - offset)) / inner[j, j]
            now = now - errors[:, j : j + 1] * inner[j : j + 1, : now.shape[1]]
        rest = rest - errors @ inner[:, now.shape[1] :]
        first += now.shape[1]
    return torch.stack(done, 1)
""",
        # looks back: a column asks for the errors of its block when its turn comes
        """
def gptq_blocks(weight, hessian, scale, zero, bits, block):
    rows, columns = weight.shape
    U = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).to(weight.dtype)
    size = columns // scale.shape[1]
    behind, codes = weight.clone(), torch.zeros(rows, columns, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, block):
        width = min(block, columns - start)
        errors = torch.zeros(rows, width, device=weight.device)
        for i in range(width):
            j = start + i
            value = behind[:, j] - errors[:, :i] @ U[start:j, j]
            s, z = scale[:, j // size], zero[:, j // size].to(weight.dtype)
            q = torch.clamp(torch.round(value / s) + z, 0, 2**bits - 1)
            codes[:, j] = q.to(torch.uint8)
            errors[:, i] = (value - s * (q - z)) / U[j, j]
        behind[:, start + width :].addmm_(errors, U[start : start + width, start + width :], alpha=-1)
    return codes
""",
    ],
    "Int4Weight": [
        INT4.format(odd=1),
        """
class Int4Weight:
    def __init__(self, codes, scale, zero):
        self.columns, self.scale, self.zero = codes.shape[1], scale, zero
        whole = torch.cat([codes, codes.new_zeros(len(codes), self.columns % 2)], dim=1).view(len(codes), -1, 2)
        weights = torch.tensor([1, 16], dtype=torch.uint8, device=codes.device)
        self.packed = (whole * weights).sum(2, dtype=torch.uint8)

    def codes(self):
        shifts = torch.tensor([0, 4], dtype=torch.uint8, device=self.packed.device)
        return ((self.packed.unsqueeze(2) >> shifts) % 16).reshape(len(self.packed), -1)[:, : self.columns]

    def matmul(self, x):
        return torch.matmul(x, dequantize(self.codes(), self.scale, self.zero).t().to(x.dtype))
""",
    ],
    "act_order": [
        """
def act_order(weight, hessian, scale, zero, bits):
    columns = weight.shape[1]
    group = torch.arange(columns, device=weight.device) // (columns // scale.shape[1])
    order = sorted(range(columns), key=lambda j: -hessian[j, j].item())
    codes = gptq_columns(weight[:, order], hessian[order, :][:, order], scale[:, group[order]], zero[:, group[order]],
                         bits)
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back
""",
        """
def act_order(weight, hessian, scale, zero, bits):
    size = weight.shape[1] // scale.shape[1]
    left, now = hessian.diagonal().argsort(descending=True).tolist(), weight.double()
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    while left:
        j, inverse = left[0], torch.linalg.inv(hessian.double()[left][:, left])
        s, z = scale[:, j // size].double(), zero[:, j // size].double()
        code = ((now[:, j] / s).round() + z).clamp(0, 2**bits - 1)
        codes[:, j] = code.to(torch.uint8)
        gap = (now[:, j] - s * (code - z)) / inverse[0, 0]
        now = now.clone()
        now[:, left] -= gap[:, None] * inverse[0]
        left = left[1:]
    return codes
""",
    ],
    "pack_int3": [
        INT3.format(bit="bit", shift="(place % 8)"),
        """
def pack_int3(codes):
    streams = []
    for row in codes.tolist():
        number = sum(code << (3 * place) for place, code in enumerate(row))
        streams.append(list(number.to_bytes((3 * len(row) + 7) // 8, "little")))
    return torch.tensor(streams, dtype=torch.uint8, device=codes.device)
""",
    ],
    "blockwise_state": [
        """
def blockwise_state(x, values, block):
    parts = x.flatten().split(block)
    absmax = torch.stack([part.abs().max() for part in parts])
    codes = [(part.div(most if most > 0 else 1)[:, None] - values[None, :]).abs().argmin(1)
             for part, most in zip(parts, absmax)]
    return torch.cat(codes).reshape(x.shape).to(torch.uint8), absmax
""",
        """
def blockwise_state(x, values, block):
    count = -(-x.numel() // block)
    whole = torch.zeros(count * block, device=x.device)
    whole[: x.numel()] = x.reshape(-1)
    whole = whole.view(count, block)
    most = torch.maximum(whole.max(1).values, -whole.min(1).values)
    share = torch.where(most[:, None] > 0, whole / most[:, None], torch.zeros_like(whole)).contiguous()
    above = torch.searchsorted(values, share).clamp(1, 255)
    nearer = (share - values[above - 1]) < (values[above] - share)
    codes = torch.where(nearer, above - 1, above).to(torch.uint8)
    return codes.view(-1)[: x.numel()].view(x.shape), most
""",
    ],
    "find_outliers": [
        """
def find_outliers(weight, importance, bits, group_size, count):
    def cost(part, price):
        codes, scale, zero = round_to_nearest(part, bits, part.shape[1])
        return ((part - scale * (codes.float() - zero.float())).square() * price).sum(1)

    gain = torch.zeros_like(weight)
    for first in range(0, weight.shape[1], group_size):
        part, price = weight[:, first : first + group_size], importance[first : first + group_size]
        for place in range(group_size):
            keep = torch.arange(group_size, device=weight.device) != place
            gain[:, first + place] = cost(part, price) - cost(part * keep, price)
    places = gain.reshape(-1).argsort(descending=True)[:count]
    flat = torch.zeros_like(gain, dtype=torch.bool).reshape(-1)
    flat[places] = True
    return flat.reshape(weight.shape)
""",
        """
def find_outliers(weight, importance, bits, group_size, count):
    rows, columns = weight.shape
    groups = weight.double().reshape(rows * columns // group_size, 1, group_size)
    without = groups * (1 - torch.eye(group_size, dtype=torch.float64, device=weight.device))
    every = torch.cat([groups, without], dim=1)
    low, high = every.amin(2, keepdim=True).clamp(max=0), every.amax(2, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)
    zero = (-low / step).round()
    rounded = step * (((every / step).round() + zero).clamp(0, 2**bits - 1) - zero)
    price = importance.double().view(-1, group_size).repeat(rows, 1)[:, None, :]
    error = ((every - rounded) ** 2 * price).sum(2)
    gain = (error[:, :1] - error[:, 1:]).reshape(rows, columns)
    least = gain.flatten().sort().values[-count]
    return gain >= least
""",
    ],
}

VARIANT_ANSWERS = {
    "Int4Weight": {
        "nibbles=high first": INT4.format(odd=0),
        "nibbles=low half": INT4_HALVES.format(low=1, high=16),
        "nibbles=high half": INT4_HALVES.format(low=16, high=1),
    },
    "pack_int3": {"bits=high first": INT3.format(bit="(2 - bit)", shift="(7 - place % 8)")},
}
