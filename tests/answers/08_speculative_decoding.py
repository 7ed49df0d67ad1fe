"""Right answers of lab 08 that are written differently from the solution: no check may refuse one."""

STEP = """
def speculative_step(target, drafter, prefix, gamma, uniforms, temperature, top_k, top_p):
    def pick(weights, u):
        weights = weights.tolist()
        up = list(range(len(weights)))
        order = {order}
        wanted, seen = float(u) * sum(weights), 0.0
        for token in order:
            seen += weights[token]
            if seen > wanted:
                return token
        return max(range(len(weights)), key=weights.__getitem__)

    text, qs = prefix.tolist(), []
    for i in range(gamma):
        ids = torch.tensor(text, device=prefix.device)
        qs.append(sampling_distribution(drafter(ids)[-1], temperature, top_k, top_p))
        text.append(pick(qs[-1], uniforms[i]))
    ps = sampling_distribution(target(torch.tensor(text, device=prefix.device)), temperature, top_k, top_p)
    start, new, tested = len(prefix), [], 0
    for i in range(gamma):
        p, q, token = ps[start - 1 + i], qs[i], text[start + i]
        tested += 1
        if float(uniforms[gamma + i]) * float(q[token]) < float(p[token]):
            new.append(token)
            continue
        new.append(pick(adjusted_distribution(p, q), uniforms[2 * gamma]))
        break
    else:
        new.append(pick(ps[-1], uniforms[2 * gamma]))
    made = lambda values: torch.tensor(values, device=prefix.device)
    return made(new), made(text[start:]), tested
"""

ANSWERS = {
    "accept_drafts": [
        """
def accept_drafts(p, q, drafts, uniforms):
    ratio = torch.take_along_dim(p, drafts[..., None], -1) / torch.take_along_dim(q, drafts[..., None], -1)
    rejected = uniforms >= ratio[..., 0]
    gamma = drafts.shape[-1]
    places = torch.arange(gamma, device=drafts.device).expand_as(drafts)
    first = torch.where(rejected, places, gamma).amin(-1)
    return first, torch.where(first < gamma, first + 1, gamma)
""",
        """
def accept_drafts(p, q, drafts, uniforms):
    gamma, size = p.shape[-2:]
    counts, looked = [], []
    for P, Q, x, u in zip(p.reshape(-1, gamma, size), q.reshape(-1, gamma, size), drafts.reshape(-1, gamma),
                          uniforms.reshape(-1, gamma)):
        n = 0
        while n < gamma and u[n] < P[n, x[n]] / Q[n, x[n]]:
            n += 1
        counts.append(n)
        looked.append(min(n + 1, gamma))
    back = lambda numbers: torch.tensor(numbers, device=drafts.device).reshape(drafts.shape[:-1])
    return back(counts), back(looked)
""",
    ],
    "adjusted_distribution": [
        """
def adjusted_distribution(p, q):
    left = p - torch.minimum(p, q)
    nothing = left.eq(0).all(dim=-1, keepdim=True)
    left = torch.where(nothing, p, left)
    return F.normalize(left, p=1, dim=-1)
""",
        """
def adjusted_distribution(p, q):
    rows = []
    for a, b in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, p.shape[-1])):
        rest = F.relu(a.double() - b.double())
        rows.append((rest / rest.sum()).float() if (a > b).any() else a.clone())
    return torch.stack(rows).reshape(p.shape)
""",
    ],
    "sampling_distribution": [
        """
def sampling_distribution(logits, temperature, top_k, top_p):
    x = logits.to(torch.float32)
    if not temperature:
        best = x.max(-1, keepdim=True).values
        return (x == best).float()
    x = x / temperature
    if top_k:
        k = min(top_k, x.shape[-1])
        kth = x.sort(-1, descending=True).values[..., k - 1, None]
        x = torch.where(x < kth, float("-inf"), x)
    p = torch.softmax(x, -1)
    if top_p < 1:
        # what is likelier than a token, added up: a token stays while that is below top_p
        likelier = (p[..., None, :] > p[..., :, None]).float() @ p[..., :, None]
        p = torch.where(likelier[..., 0] < top_p, p, 0.0)
    return p / p.sum(-1, keepdim=True)
""",
        """
def sampling_distribution(logits, temperature, top_k, top_p):
    size = logits.shape[-1]
    out = []
    for row in logits.reshape(-1, size).float():
        if temperature == 0:
            out.append(torch.eye(size, device=row.device)[row.argmax()])
            continue
        p = torch.exp((row - row.max()) / temperature)
        if 0 < top_k < size:
            p = p * (row >= row.sort().values[-top_k])
        p = p / p.sum()
        total, stay = 0.0, torch.zeros_like(p)
        for token in p.argsort(descending=True).tolist():
            if total >= top_p and top_p < 1:
                break
            stay[token] = 1.0
            total += float(p[token])
        p = p * stay
        out.append(p / p.sum())
    return torch.stack(out).reshape(logits.shape)
""",
    ],
    "speculative_step": [
        STEP.format(order="up"),
        """
def speculative_step(target, drafter, prefix, gamma, uniforms, temperature, top_k, top_p):
    draws, coins, last = uniforms.split([gamma, gamma, 1])

    def chosen(weights, u):
        sums = weights.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(sums, u.double().view(1) * sums[-1], right=True)

    size, text, q = len(prefix), prefix.clone(), torch.empty(0)
    for u in draws:
        here = sampling_distribution(drafter(text)[-1:], temperature, top_k, top_p)
        q = here if not len(q) else torch.vstack([q, here])
        text = torch.hstack([text, chosen(here[0], u)])
    p = sampling_distribution(target(text), temperature, top_k, top_p)[size - 1 :]
    count, tested = accept_drafts(p[:-1], q, text[size:], coins)
    nothing = torch.zeros_like(p[:1])  # behind the last draft nothing is subtracted
    left = adjusted_distribution(p, torch.vstack([q, nothing]))
    n = int(count)
    return torch.hstack([text[size : size + n], chosen(left[n], last)]), text[size:], int(tested)
""",
    ],
    "roll_back": [
        """
def roll_back(cache, held, accepted, gamma):
    stay = held.sum(1) - gamma + accepted
    held = held & (held.long().cumsum(1) <= stay[:, None])
    columns = int(held.any(0).nonzero().max()) + 1
    return [tuple(x[..., :columns, :] for x in layer) for layer in cache], held[:, :columns], stay
""",
        """
def roll_back(cache, held, accepted, gamma):
    drop = gamma - accepted.max().item()
    rows = []
    for row, n in zip(held, accepted.tolist()):
        tail = [True] * n + [False] * (gamma - n)
        rows.append(torch.cat([row[: len(row) - gamma], torch.tensor(tail, dtype=torch.bool, device=row.device)]))
    mask = torch.stack(rows)
    width = mask.shape[1] - drop
    return [(k.narrow(2, 0, width), v.narrow(2, 0, width)) for k, v in cache], mask[:, :width], mask.long().sum(-1)
""",
    ],
    "SpeedModel": [
        """
class SpeedModel:
    def __init__(self, alpha, cost_ratio=0.0):
        self.a, self.c = alpha, cost_ratio

    def expected_tokens(self, gamma):
        return gamma + 1.0 if self.a == 1 else (1 - self.a ** (gamma + 1)) / (1 - self.a)

    def speedup(self, gamma):
        return self.expected_tokens(gamma) / (1 + self.c * gamma)

    def best_gamma(self, most):
        best = 0
        for gamma in range(1, most + 1):
            if self.speedup(gamma) > self.speedup(best):
                best = gamma
        return best

    def implied_cost_ratio(self, gamma, measured):
        return (self.expected_tokens(gamma) - measured) / (measured * gamma)
""",
        """
class SpeedModel:
    def __init__(self, alpha, cost_ratio=0.0):
        self.alpha = alpha
        self.cost_ratio = cost_ratio

    def expected_tokens(self, gamma):
        total, chance = 1.0, 1.0
        for _ in range(gamma):
            chance *= self.alpha
            total += chance
        return total

    def speedup(self, gamma):
        return self.expected_tokens(gamma) / (gamma * self.cost_ratio + 1.0)

    def best_gamma(self, most):
        speeds = [self.speedup(gamma) for gamma in range(most + 1)]
        return speeds.index(max(speeds))

    def implied_cost_ratio(self, gamma, measured):
        passes = self.expected_tokens(gamma) / measured
        return (passes - 1.0) / gamma
""",
    ],
    "lookup_draft": [
        """
def lookup_draft(tokens, gamma, most):
    length = tokens.numel()
    for n in range(min(most, length - 1), 0, -1):
        windows = tokens.unfold(0, n, 1)[:-1]
        starts = (windows == tokens[-n:]).all(1).nonzero().flatten() + n
        if starts.numel():
            full = starts[starts <= length - gamma]
            start = int(full.max() if full.numel() else starts.max())
            return tokens[start : min(start + gamma, length)].clone()
    return tokens.new_empty(0)
""",
        """
def lookup_draft(tokens, gamma, most):
    text = tokens.tolist()
    found, best = [], (0, False, 0)
    for start in range(1, len(text)):
        n = 0
        while n < most and n < start and text[start - 1 - n] == text[-1 - n]:
            n += 1
        rank = (n, start + gamma <= len(text), start)
        if n and rank > best:
            found, best = text[start : start + gamma], rank
    return torch.tensor(found, dtype=torch.long, device=tokens.device)
""",
    ],
    "early_exit": [
        """
def early_exit(logits, threshold, least):
    layers = len(logits)
    exits = torch.full(logits.shape[1:-1], layers, dtype=torch.long, device=logits.device)
    tokens = logits[-1].argmax(-1)
    for layer in range(layers - 1, least - 1, -1):
        chances = torch.softmax(logits[layer - 1], -1).sort(-1).values
        leaves = chances[..., -1] - chances[..., -2] >= threshold
        exits = torch.where(leaves, layer, exits)
        tokens = torch.where(leaves, logits[layer - 1].argmax(-1), tokens)
    return tokens, exits
""",
        """
def early_exit(logits, threshold, least):
    shape, size = logits.shape[1:-1], logits.shape[-1]
    flat = logits.reshape(len(logits), -1, size)
    tokens, exits = [], []
    for place in range(flat.shape[1]):
        for layer in range(least, len(logits) + 1):
            two = flat[layer - 1, place].softmax(0).topk(2)
            if two.values[0] - two.values[1] >= threshold or layer == len(logits):
                tokens.append(int(two.indices[0]))
                exits.append(layer)
                break
    made = lambda numbers: torch.tensor(numbers, device=logits.device).reshape(shape)
    return made(tokens), made(exits)
""",
    ],
    "DraftTree": [
        """
class DraftTree:
    def __init__(self, parents, tokens):
        self.parents, self.tokens = parents, tokens

    def line(self, node):
        return [] if node < 0 else [node, *self.line(self.parents[node])]

    def mask(self):
        seen = torch.zeros(len(self.parents), len(self.parents), dtype=torch.bool)
        for node in range(len(self.parents)):
            seen[node, self.line(node)] = True
        return seen

    def depths(self):
        return torch.tensor([len(self.line(node)) - 1 for node in range(len(self.parents))])

    def accept(self, best):
        children = {(parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.tokens))}
        path, at = [], 0
        while (at, best[at]) in children:
            at = children[at, best[at]]
            path.append(at)
        return path, best[at]
""",
        """
class DraftTree:
    def __init__(self, parents, tokens):
        self.parents, self.tokens = list(parents), list(tokens)

    def mask(self):
        size = len(self.parents)
        up = torch.zeros(size, size)
        for node in range(1, size):
            up[node, self.parents[node]] = 1.0
        seen, step = torch.eye(size), torch.eye(size)
        for _ in range(size):
            step = step @ up
            seen = seen + step
        return seen > 0

    def depths(self):
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return torch.tensor(depths)

    def accept(self, best):
        def walk(node):
            for child, parent in enumerate(self.parents):
                if parent == node and self.tokens[child] == best[node]:
                    rest, token = walk(child)
                    return [child, *rest], token
            return [], best[node]

        return walk(0)
""",
    ],
}

ORDERS = {"last": "up[::-1]", "even": "up[::2] + up[1::2]", "odd": "sorted(up, key=lambda x: (x % 2 == 0, x))"}
VARIANT_ANSWERS = {
    "speculative_step": {f"draw_from={name}": STEP.format(order=order) for name, order in ORDERS.items()}
}
