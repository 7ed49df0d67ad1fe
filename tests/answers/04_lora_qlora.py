"""Right answers of lab 04 that are written differently from the solution: no check may refuse one."""

LORA = '''
class LoRALinear(nn.Module):
    """With the update as two layers, and the weight swapped, not changed."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base
        for parameter in base.parameters():
            parameter.requires_grad = False
        weight = base.weight
        self.a = nn.Parameter(torch.empty(r, base.in_features, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, r, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.s = alpha / {divisor}
        self.original = weight.data
        self.merged = self.off = False

    def forward(self, x):
        h = F.linear(x, self.base.weight, self.base.bias)
        if self.merged or self.off:
            return h
        return h + F.linear(F.linear(x, self.a), self.b) * self.s

    def merge(self):
        if not self.merged:
            self.base.weight = nn.Parameter(self.original + self.s * (self.b @ self.a).detach(), requires_grad=False)
            self.merged = True

    def unmerge(self):
        self.base.weight = nn.Parameter(self.original, requires_grad=False)
        self.merged = False

    def disable(self):
        self.unmerge()
        self.off = True

    def enable(self):
        self.off = False
'''

BOTTLENECK = """
class Bottleneck(nn.Module):
    def __init__(self, base, size):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.weight.shape[0], size).to(base.weight)
        self.up = nn.Linear(size, base.weight.shape[0]).to(base.weight)
        for parameter in self.up.parameters():
            parameter.data.zero_()

    def forward(self, x):
        h = self.base(x)
        inner = self.down(h)
        return torch.add(self.up(inner * {gate}), h)
"""

AFFINE = """
def affine_int8(x, block):
    codes, scales, zeros = [], [], []
    for part in x.reshape(-1).split(block):
        low, high = min(0.0, part.min().item()), max(0.0, part.max().item())
        scale = (high - low) / 255
        if scale == 0:
            scale = 1.0
        zero = min(max(int(math.floor(-low / scale + 0.5)), 0), 255)
        own = [min(max(int(round(value / scale)) + zero, 0), 255) for value in part.tolist()]
        codes += own
        scales.append(scale)
        zeros.append(zero)
    codes, zeros = torch.tensor(codes, device=x.device){shift}, torch.tensor(zeros, device=x.device){shift}
    return codes.to(torch.{dtype}).view(x.shape), torch.tensor(scales, device=x.device), zeros
"""

ANSWERS = {
    "LoRALinear": [
        LORA.format(divisor="r"),
        '''
class LoRALinear(nn.Module):
    """With the update as modules, and a state by name."""

    def __init__(self, base, r, alpha):
        super().__init__()
        base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)
        self.base = base
        bound = base.in_features ** -0.5
        start = (torch.rand(r, base.in_features, dtype=base.weight.dtype) * 2 - 1) * bound
        self.a = nn.Parameter(start.to(base.weight.device))
        self.b = nn.Parameter(torch.zeros_like(base.weight[:, :1]).repeat(1, r))
        self.r, self.alpha, self.state = r, alpha, "on"

    def update(self):
        return self.alpha * self.b.detach() @ self.a.detach() / self.r

    def forward(self, x):
        if self.state != "on":
            return self.base(x)
        low = torch.einsum("...i,ri->...r", x, self.a) * (self.alpha / self.r)
        return self.base(x) + torch.einsum("...r,or->...o", low, self.b)

    def merge(self):
        if self.state == "on":
            self.backup = self.base.weight.data.clone()
            self.base.weight.data += self.update()
            self.state = "merged"

    def unmerge(self):
        if self.state == "merged":
            self.base.weight.data[:] = self.backup
            del self.backup
            self.state = "on"

    def disable(self):
        self.unmerge()
        self.state = "off"

    def enable(self):
        self.state = "on"
''',
    ],
    "inject": [
        """
def inject(model, targets, make):
    def named(module, prefix=()):
        for leaf, child in module.named_children():
            path = (*prefix, leaf)
            if isinstance(child, nn.Linear):
                yield module, leaf, path
            else:
                yield from named(child, path)

    everything = list(named(model))
    chosen, seen = [], set()
    for parent, leaf, path in everything:
        hits = {t for t in targets if list(path[-len(t.split(".")):]) == t.split(".")}
        seen |= hits
        if hits:
            chosen.append((parent, leaf, path))
    for target in targets:
        if target not in seen:
            raise ValueError("nothing is called " + target)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parent, leaf, _ in chosen:
        parent.add_module(leaf, make(getattr(parent, leaf)))
    return [".".join(path) for _, _, path in chosen]
""",
        """
import re


def inject(model, targets, make):
    patterns = {t: re.compile(r"(?:.*\\.)?" + re.escape(t)) for t in targets}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    unknown = [t for t, p in patterns.items() if not any(p.fullmatch(n) for n in names)]
    if unknown:
        raise ValueError(f"no linear layer: {unknown}; there are {names}")
    names = [n for n in names if any(p.fullmatch(n) for p in patterns.values())]
    for p in model.parameters():
        p.requires_grad_(False)
    for name in names:
        parent = model
        *path, leaf = name.split(".")
        for step in path:
            parent = parent._modules[step]
        parent._modules[leaf] = make(parent._modules[leaf])
    return names
""",
    ],
    "Bottleneck": [
        BOTTLENECK.format(gate="(inner > 0)"),
        """
class Bottleneck(nn.Module):
    def __init__(self, base, size):
        super().__init__()
        width, like = base.out_features, base.weight
        self.base, self.size = base, size
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.up = nn.utils.skip_init(nn.Linear, size, width, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            self.up.weight.fill_(0.0)
            self.up.bias.fill_(0.0)
        self.between = nn.Sequential(self.down, nn.ReLU(), self.up)

    def forward(self, x):
        h = self.base(x)
        return h + self.between(h)
""",
    ],
    "affine_int8": [
        AFFINE.format(shift=" - 128", dtype="int8"),
        """
def affine_int8(x, block):
    flat = x.double().flatten()
    number = torch.arange(len(flat), device=x.device) // block
    zero = flat.new_zeros(int(number[-1]) + 1)
    low = zero.scatter_reduce(0, number, flat, "amin")
    high = zero.scatter_reduce(0, number, flat, "amax")
    scales = torch.where(high > low, (high - low) / 255, torch.ones_like(low))
    zeros = -128 - (low / scales).round().long()
    codes = ((flat / scales[number]).round().long() + zeros[number]).clamp(-128, 127)
    return codes.to(torch.int8).reshape(x.shape), scales.float(), zeros
""",
    ],
    "NF4": [
        """
from statistics import NormalDist


class NF4:
    @staticmethod
    def levels():
        quantile, p = NormalDist().inv_cdf, 0.9677083
        above = [quantile(0.5 + (p - 0.5) * i / 8) for i in range(1, 9)]
        below = [quantile(0.5 - (p - 0.5) * i / 7) for i in range(7, 0, -1)]
        return torch.tensor([x / above[-1] for x in (*below, 0.0, *above)])

    @staticmethod
    def quantize(x, levels, block):
        codes, absmax = [], []
        for part in x.flatten().split(block):
            absmax.append(part.abs().max())
            scaled = part / absmax[-1] if absmax[-1] > 0 else part
            codes.append((scaled[:, None] - levels[None]).abs().argmin(1))
        return torch.cat(codes).byte(), torch.stack(absmax)

    @staticmethod
    def dequantize(codes, absmax, levels, block):
        each = absmax[torch.arange(len(codes), device=codes.device) // block]
        return levels.take(codes.long()) * each
""",
        """
class NF4:
    def levels():
        half = torch.distributions.Normal(0.0, 1.0).icdf
        up = half(torch.linspace(0.5, OUTERMOST, 9))
        down = half(torch.linspace(1 - OUTERMOST, 0.5, 8))
        levels = torch.cat([down[:-1], up]) / up[-1]
        levels[7] = 0
        levels[0] = -1
        return levels

    def quantize(x, levels, block):
        padded = torch.zeros(-(-x.numel() // block) * block, dtype=x.dtype, device=x.device)
        padded[: x.numel()] = x.reshape(-1)
        absmax = padded.view(-1, block).abs().max(dim=1).values
        scaled = (padded.view(-1, block) / absmax.clamp(min=1e-30).unsqueeze(1)).flatten()[: x.numel()]
        above = torch.searchsorted(levels.contiguous(), scaled).clamp(1, len(levels) - 1)
        closer = (scaled - levels[above - 1]) < (levels[above] - scaled)
        return (above - closer.long()).to(torch.uint8), absmax

    def dequantize(codes, absmax, levels, block):
        values = [levels[part.long()] * scale for part, scale in zip(codes.split(block), absmax)]
        return torch.cat(values)
""",
    ],
    "double_quantize": [
        """
def double_quantize(absmax, group):
    mean = absmax.double().mean()
    codes, magnitudes = [], []
    for part in (absmax.double() - mean).split(group):
        magnitude = part.abs().max()
        magnitudes.append(magnitude)
        step = magnitude / 127 if magnitude > 0 else 1.0
        codes.append(torch.round(part / step))
    return torch.cat(codes).to(torch.int8), torch.stack(magnitudes).float(), mean.float()
""",
        """
def double_quantize(absmax, group):
    mean = absmax.sum() / absmax.numel()
    number = torch.arange(absmax.numel(), device=absmax.device) // group
    magnitudes = absmax.new_zeros(int(number[-1]) + 1).scatter_reduce(0, number, (absmax - mean).abs(), "amax")
    scaled = torch.nan_to_num((absmax - mean) * 127 / magnitudes[number])
    codes = torch.floor(scaled.clamp(-127, 127) + 0.5).to(torch.int8)
    return codes, magnitudes, mean
""",
    ],
    "qlora_linear": [
        """
class Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dequantize):
        ctx.dequantize = dequantize
        return x @ dequantize().T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.dequantize() if ctx.needs_input_grad[0] else None, None


def qlora_linear(x, a, b, scaling, dequantize):
    return Frozen.apply(x, dequantize) + F.linear(F.linear(x * scaling, a), b)
""",
        """
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, scaling, dequantize):
        ctx.tensors, ctx.rest = (x, a, b), (scaling, dequantize)
        return torch.einsum("...i,oi->...o", x, dequantize()) + scaling * F.linear(F.linear(x, a), b)

    @staticmethod
    def backward(ctx, gradient):
        scaling, dequantize = ctx.rest
        leaves = [t.detach().requires_grad_() for t in ctx.tensors]
        with torch.enable_grad():
            out = F.linear(leaves[0], dequantize()) + scaling * F.linear(F.linear(leaves[0], leaves[1]), leaves[2])
        return (*torch.autograd.grad(out, leaves, gradient), None, None)


def qlora_linear(x, a, b, scaling, dequantize):
    return Again.apply(x, a, b, scaling, dequantize)
""",
    ],
    "serve_adapters": [
        """
def serve_adapters(x, base, adapters, names):
    updates = []
    for sample, name in zip(x, names):
        if name is None:
            updates.append(torch.zeros(()))
        else:
            a, b, scaling = adapters[name]
            updates.append(scaling * F.linear(F.linear(sample, a), b))
    out = base(x)
    return torch.stack([row + update for row, update in zip(out, updates)])
""",
        """
def serve_adapters(x, base, adapters, names):
    out = base(x.flatten(0, 1)).view(*x.shape[:2], -1)
    for name, (a, b, scaling) in adapters.items():
        mask = torch.tensor([own == name for own in names], device=x.device)[:, None, None]
        out = out + mask * (scaling * x @ a.T @ b.T)
    return out
""",
    ],
    "in_subspace": [
        """
def in_subspace(start, directions, z):
    names = list(start)
    flat = torch.cat([directions[n].reshape(len(z), -1) for n in names], dim=1)
    step = z @ F.normalize(flat, dim=1)
    moved, at = {}, 0
    for n in names:
        size = start[n].numel()
        moved[n] = start[n] + step[at : at + size].view_as(start[n])
        at += size
    return moved
""",
        """
def in_subspace(start, directions, z):
    point = dict(start)
    for i in range(len(z)):
        length = math.sqrt(sum(float((part[i].double() ** 2).sum()) for part in directions.values()))
        for name in point:
            point[name] = point[name] + z[i] * directions[name][i] / length
    return point
""",
    ],
}

VARIANT_ANSWERS = {
    "LoRALinear": {"divisor=sqrt(r)": LORA.format(divisor="math.sqrt(r)")},
    "Bottleneck": {"activation=silu": BOTTLENECK.format(gate="torch.sigmoid(inner)")},
    "affine_int8": {"codes=uint8": AFFINE.format(shift="", dtype="uint8")},
}
