"""Right answers of lab 03 that are written differently from the solution: no check may refuse one."""

MEMORY = """
def training_memory(shape, batch, length, size, per_token=20, per_pair=3):
    bytes_of = dict.fromkeys(("weights", "gradients", "optimizer", "hidden states"), 0)
    bytes_of["weights"] += shape["parameters"] * size
    bytes_of["gradients"] += shape["trainable"] * {width}
    for _ in ("average of the gradient", "average of its square"):
        bytes_of["optimizer"] += shape["trainable"] * size
    for _ in range(shape["layers"]):
        tokens, pairs = batch * length, batch * shape["heads"] * length * length
        bytes_of["hidden states"] += (tokens * per_token * shape["hidden"] + pairs * per_pair) * size
    return bytes_of
"""

SCALED = """
def scaled_step(scaler, optimizer, max_norm):
    gradients = []
    for group in optimizer.param_groups:
        gradients += [p.grad for p in group["params"] if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) / scaler.scale
    norm = flat.norm().item()
    if not math.isfinite(norm):
        scaler.scale, scaler.good_steps = scaler.scale * 0.5, 0
        return False
    factor = min(1.0, max_norm / (norm + 1e-6)) / scaler.scale
    with torch.no_grad():
        for g in gradients:
            g *= factor
    optimizer.step()
    scaler.good_steps = (scaler.good_steps + 1) % {interval}
    if scaler.good_steps == 0:
        scaler.scale = 2 * scaler.scale
    return True
"""

SEGMENTS = """
def checkpoint_segments(layers, x):
    k = int(math.sqrt(len(layers)) + 0.5)
    sizes = sorted((len(layers[i::k]) for i in range(k)), reverse={first})
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    for first, last in zip(edges, edges[1:]):
        x = checkpoint(nn.Sequential(*layers[first:last]), x)
    return x
"""

ANSWERS = {
    "training_memory": [
        MEMORY.format(width="size"),
        """
def training_memory(shape, batch, length, size, per_token=20, per_pair=3):
    n, t, layers, h, a = (shape[key] for key in ("parameters", "trainable", "layers", "hidden", "heads"))
    numbers = {"weights": n, "gradients": t, "optimizer": t + t,
               "hidden states": batch * layers * length * (per_token * h + per_pair * a * length)}
    return {name: float(count * size) for name, count in numbers.items()}
""",
    ],
    "largest_batch": [
        """
def largest_batch(memory, capacity):
    step = 1
    while memory(step) <= capacity:
        step *= 2
    batch = 0
    while step:
        if memory(batch + step) <= capacity:
            batch += step
        step //= 2
    return batch
""",
        """
import bisect


def largest_batch(memory, capacity):
    class Memory:
        def __getitem__(self, i):
            return memory(i + 1)

    limit = 16
    while memory(limit) <= capacity:
        limit *= 16
    return bisect.bisect_right(Memory(), capacity, 0, limit)
""",
    ],
    "accumulate": [
        """
def accumulate(model, micro_batches):
    for p in model.parameters():
        p.grad = None
    counts = [int(targets.ne(-100).sum()) for _, targets in micro_batches]
    losses = []
    for (tokens, targets), count in zip(micro_batches, counts):
        if not count:
            continue
        mean = F.cross_entropy(model(tokens).transpose(1, 2), targets)
        (mean * (count / sum(counts))).backward()
        losses.append(mean.detach() * count)
    return (sum(losses) / sum(counts)).item()
""",
        """
def accumulate(model, micro_batches):
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, total, count = [torch.zeros_like(p) for p in trained], 0.0, 0
    for tokens, targets in micro_batches:
        seen = targets >= 0
        chosen = model(tokens).log_softmax(-1)[seen].gather(1, targets[seen][:, None])
        loss = -chosen.sum()
        for sum_so_far, g in zip(gradients, torch.autograd.grad(loss, trained)):
            sum_so_far += g
        total, count = total + loss.item(), count + seen.sum().item()
    model.zero_grad(set_to_none=True)
    for p, g in zip(trained, gradients):
        p.grad = g / count
    return total / count
""",
        """
def accumulate(model, micro_batches):
    model.zero_grad()
    total, count = 0.0, 0
    for tokens, targets in micro_batches:
        logits = model(tokens).float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none").sum()
        loss.backward()
        total += loss.detach()
        count += (targets != -100).sum()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(count)
    return float(total / count)
""",
    ],
    "checkpoint": [
        '''
def checkpoint(function, *inputs):
    """As torch.utils.checkpoint without reentrance: what autograd saves is replaced by its number."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    state, saved, again = random_state(), [], {}

    def pack(x):
        saved.append(None)
        return len(saved) - 1

    def unpack(number):
        if not again:
            kept = []
            present = random_state()
            set_random_state(state)
            fresh = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in inputs]
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(
                    lambda x: kept.append(x.detach()), lambda x: x):
                function(*fresh)
            set_random_state(present)
            again.update(enumerate(kept))
        return again.pop(number)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(*inputs)
''',
        """
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, function, box, *inputs):
        ctx.function, ctx.inputs = function, inputs
        ctx.cpu = torch.get_rng_state()
        ctx.gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        leaves, box["spec"] = tree_flatten(function(*inputs))
        return (*leaves, None)

    @staticmethod
    def backward(ctx, *gradients):
        copies = []
        for x in ctx.inputs:
            if torch.is_tensor(x):
                copy = x.detach()
                copy.requires_grad = x.requires_grad
                copies.append(copy)
            else:
                copies.append(x)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(ctx.cpu)
            if ctx.gpu is not None:
                torch.cuda.set_rng_state(ctx.gpu)
            leaves = tree_flatten(ctx.function(*copies))[0]
            total = 0
            for leaf, g in zip(leaves, gradients):
                if torch.is_tensor(leaf) and leaf.requires_grad:
                    total = total + (leaf * g).sum()
        total.backward()
        return None, None, None, *[getattr(x, "grad", None) for x in copies]


def checkpoint(function, *inputs):
    box = {}
    leaves = Twice.apply(torch.ones(1).requires_grad_(), function, box, *inputs)
    return tree_unflatten(list(leaves[:-1]), box["spec"])
""",
    ],
    "mixed_loss": [
        """
def mixed_loss(x, gain, weight, targets):
    half = x.dtype
    x = x.to(torch.float32)
    scale = (x.pow(2).sum(-1, keepdim=True) / x.shape[1] + 1e-6).sqrt()
    logits = F.linear((gain * x / scale).to(half), weight.to(half)).to(torch.float32)
    chosen = logits[torch.arange(len(targets), device=x.device), targets]
    return (logits.logsumexp(-1) - chosen).mean()
""",
        """
def mixed_loss(x, gain, weight, targets):
    normed = F.rms_norm(x.float(), (x.shape[1],), gain, eps=1e-6)
    logits = torch.einsum("td,vd->tv", normed.to(x.dtype), weight.to(x.dtype))
    return -torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, targets[:, None]).mean()
""",
    ],
    "scaled_step": [
        SCALED.format(interval=3),
        """
def scaled_step(scaler, optimizer, max_norm):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    overflow = False
    for p in parameters:
        if p.grad is not None:
            overflow |= bool((torch.isinf(p.grad) | torch.isnan(p.grad)).any())
            p.grad = p.grad / scaler.scale
    if overflow:
        optimizer.zero_grad()
        scaler.scale = scaler.scale / 2
        scaler.good_steps = 0
    else:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        scaler.good_steps += 1
    if scaler.good_steps >= 3:
        scaler.scale, scaler.good_steps = scaler.scale * 2, 0
    return not overflow
""",
    ],
    "checkpoint_segments": [
        SEGMENTS.format(first=True),
        """
def checkpoint_segments(layers, x):
    left, k = list(layers), round(len(layers) ** 0.5)
    while k:
        size = -(-len(left) // k)
        segment, left, k = left[:size], left[size:], k - 1

        def run(x, segment):
            for layer in segment:
                x = layer(x)
            return x

        import functools
        x = checkpoint(functools.partial(run, segment=segment), x)
    return x
""",
    ],
    "factored_update": [
        """
def factored_update(gradient, row, column, decay):
    squared = gradient.square().add(1e-30)
    row = torch.lerp(squared.mean(dim=-1), row, decay)
    column = torch.lerp(squared.mean(dim=-2), column, decay)
    by_row = (row / row.mean(dim=-1, keepdim=True)).rsqrt()
    return row, column, gradient * by_row.unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
""",
        """
def factored_update(gradient, row, column, decay):
    if gradient.dim() > 2:
        parts = [factored_update(*part, decay) for part in zip(gradient, row, column)]
        return tuple(torch.stack(column_of) for column_of in zip(*parts))
    n, m = gradient.shape
    new_row = torch.stack([decay * row[i] + (1 - decay) * ((gradient[i] ** 2).sum() / m + 1e-30) for i in range(n)])
    new_column = torch.stack(
        [decay * column[j] + (1 - decay) * ((gradient[:, j] ** 2).sum() / n + 1e-30) for j in range(m)])
    second = torch.outer(new_row / new_row.mean(), new_column)
    return new_row, new_column, gradient * torch.rsqrt(second)
""",
    ],
}

VARIANT_ANSWERS = {
    "training_memory": {"gradients=float32": MEMORY.format(width="4")},
    "scaled_step": {f"growth_interval={n}": SCALED.format(interval=n) for n in "456"},
    "checkpoint_segments": {"remainder=last": SEGMENTS.format(first=False)},
}
