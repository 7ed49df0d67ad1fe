"""Right answers of lab 09 that are written differently from the solution: no check may refuse one."""

STUDENT = """
def student_weights(weights, prefix):
    import re

    pattern = re.compile(re.escape(prefix) + r"(\\d+)(\\..*)", re.DOTALL)
    layers = sorted({{int(m[1]) for m in map(pattern.fullmatch, weights) if m}})
    place = {{layer: i for i, layer in enumerate(layers[{first}::2])}}
    student = {{}}
    for name in weights:
        match = pattern.fullmatch(name)
        if match is None:
            student[name] = weights[name].detach().clone()
        elif int(match[1]) in place:
            student[prefix + str(place[int(match[1])]) + match[2]] = weights[name].detach().clone()
    return student
"""

DIVERGENCE = """
def divergence(student_logits, teacher_logits, kind):
    P, Q = teacher_logits.softmax(-1), student_logits.softmax(-1)
    log_P, log_Q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)

    def kl(p, log_p, log_q):
        return (p * (log_p - log_q)).masked_fill(log_p.isinf(), 0).sum(dim=-1)

    if kind != "jsd":
        return kl(P, log_P, log_Q) if kind == "forward" else kl(Q, log_Q, log_P)
    M = {beta} * P + (1 - {beta}) * Q
    tiny = torch.finfo(torch.float32).tiny
    log_M = M.clamp(min=tiny).log()
    return {beta} * kl(P, log_P, log_M) + (1 - {beta}) * kl(Q, log_Q, log_M)
"""

ANSWERS = {
    "soft_loss": [
        """
def soft_loss(student_logits, teacher_logits, temperature):
    with torch.no_grad():
        log_p = torch.log_softmax(teacher_logits.to(torch.float32) / temperature, -1)
    log_q = torch.log_softmax(student_logits.to(torch.float32) / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature * temperature
""",
        """
def soft_loss(student_logits, teacher_logits, temperature):
    size = student_logits.shape[-1]
    z, v = (x.reshape(-1, size).float() / temperature for x in (student_logits, teacher_logits))
    z, v = z - z.logsumexp(1, keepdim=True), (v - v.logsumexp(1, keepdim=True)).detach()
    loss = F.kl_div(z, v, reduction="sum", log_target=True) / len(z)
    return loss * temperature**2
""",
    ],
    "distillation_loss": [
        """
def distillation_loss(student_logits, teacher_logits, student_hidden, teacher_hidden, labels, temperature, weights):
    left_out = labels.eq(-100)
    count = max(int((~left_out).sum()), 1)
    clean = lambda x: x.masked_fill(left_out[..., None], 0.0)
    z, v = clean(student_logits), clean(teacher_logits)
    h, g = clean(student_hidden), clean(teacher_hidden)
    log_q, log_p = (z / temperature).log_softmax(-1), (v / temperature).log_softmax(-1)
    soft = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).masked_fill(left_out, 0.0)
    hard = F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    norms = h.norm(dim=-1).clamp(min=1e-8) * g.norm(dim=-1).clamp(min=1e-8)
    cosine = (1 - (h * g).sum(-1) / norms).masked_fill(left_out, 0.0)
    total = weights[0] * temperature**2 * soft.sum() + weights[1] * hard + weights[2] * cosine.sum()
    return total / count
""",
        """
def distillation_loss(student_logits, teacher_logits, student_hidden, teacher_hidden, labels, temperature, weights):
    where = (labels.flatten() >= 0).nonzero().squeeze(1)
    if len(where) == 0:
        return torch.zeros((), device=labels.device)
    z, v, h, g = (x.flatten(0, 1)[where] for x in (student_logits, teacher_logits, student_hidden, teacher_hidden))
    target = torch.ones(len(where), device=labels.device)
    parts = (soft_loss(z, v, temperature), F.nll_loss(z.log_softmax(1), labels.flatten()[where]),
             F.cosine_embedding_loss(h, g, target))
    return sum(w * part for w, part in zip(weights, parts))
""",
    ],
    "student_weights": [
        STUDENT.format(first=0),
        """
def student_weights(weights, prefix):
    def renamed(name):
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return None if int(number) & 1 else prefix + str(int(number) >> 1) + dot + rest

    names = {name: renamed(name) for name in weights}
    return {new: torch.empty_like(weights[old]).copy_(weights[old]) for old, new in names.items() if new is not None}
""",
    ],
    "chunked_loss": [
        '''
def chunked_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, chunk):
    """Autograd for each chunk by itself."""
    n = max(1, int((labels != -100).sum()))
    loss, to_hidden, to_weight = 0.0, [], torch.zeros_like(student_weight)
    for h, t, y in zip(student_hidden.split(chunk), teacher_hidden.split(chunk), labels.split(chunk)):
        h, w = h.detach().requires_grad_(), student_weight.detach().requires_grad_()
        with torch.no_grad():
            log_p = (t @ teacher_weight.T / temperature).log_softmax(1)
        log_q = (h @ w.T / temperature).log_softmax(1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        part = temperature**2 / n * torch.where(y == -100, 0.0, kl).sum()
        a, b = torch.autograd.grad(part, (h, w))
        loss = loss + part.detach()
        to_hidden.append(a)
        to_weight += b
    return loss, torch.cat(to_hidden), to_weight
''',
        '''
def chunked_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, chunk):
    """Rows that do not count are left out first; everything is summed, and divided at the end."""
    at = (labels != -100).nonzero().squeeze(1)
    value = student_hidden.new_zeros(())
    to_hidden, to_weight = torch.zeros_like(student_hidden), torch.zeros_like(student_weight)
    for rows in at.split(chunk):
        h = student_hidden.index_select(0, rows)
        q = (h @ student_weight.T).div_(temperature).log_softmax(1)
        p = (teacher_hidden.index_select(0, rows) @ teacher_weight.T).div_(temperature).softmax(1)
        value += F.kl_div(q, p, reduction="sum")
        q = q.exp_().sub_(p)
        to_hidden.index_copy_(0, rows, q @ student_weight)
        to_weight.addmm_(q.T, h)
    n = max(len(at), 1)
    return value * temperature**2 / n, to_hidden.mul_(temperature / n), to_weight.mul_(temperature / n)
''',
    ],
    "divergence": [
        DIVERGENCE.format(beta=0.25),
        """
def divergence(student_logits, teacher_logits, kind):
    def terms(a, b):
        none = torch.zeros(())
        return sum((torch.where(x == -math.inf, none.to(x), x.exp() * (x - y))
                    for x, y in zip(a.unbind(-1), b.unbind(-1))))

    p = teacher_logits - teacher_logits.logsumexp(-1, keepdim=True)
    q = student_logits - student_logits.logsumexp(-1, keepdim=True)
    if kind in ("forward", "reverse"):
        return terms(p, q) if kind == "forward" else terms(q, p)
    m = torch.stack([p + math.log(1 / 4), q + math.log(3 / 4)]).logsumexp(0)
    return terms(p, m) / 4 + terms(q, m) * 3 / 4
""",
    ],
    "on_policy_step": [
        """
def on_policy_step(student, teacher, prompt, uniforms):
    ids, size = prompt.clone(), prompt.shape[1]
    for step in range(uniforms.shape[1]):
        with torch.no_grad():
            cumulative = torch.softmax(student(ids)[:, -1].double(), -1).cumsum(-1)
        wanted = uniforms[:, step : step + 1].double().contiguous()
        token = torch.searchsorted(cumulative.contiguous(), wanted, right=True).clamp(max=cumulative.shape[-1] - 1)
        ids = torch.hstack([ids, token])
    q = F.log_softmax(student(ids), -1)[:, size - 1 : ids.shape[1] - 1]
    with torch.no_grad():
        p = F.log_softmax(teacher(ids), -1)[:, size - 1 : ids.shape[1] - 1]
    return ids, F.kl_div(p, q, reduction="none", log_target=True).sum(-1).mean()
""",
        """
def on_policy_step(student, teacher, prompt, uniforms):
    tokens = prompt
    losses = []
    for column in uniforms.unbind(1):
        logits = student(tokens)[:, -1]
        q = logits.log_softmax(-1)
        p = teacher(tokens)[:, -1].detach().log_softmax(-1)
        losses.append((q.exp() * (q - p)).sum(-1))
        above = logits.detach().double().softmax(-1).cumsum(-1) > column[:, None]
        token = torch.where(above.any(-1), above.int().argmax(-1), above.shape[-1] - 1)
        tokens = torch.cat([tokens, token[:, None]], 1)
    return tokens, torch.stack(losses).mean()
""",
    ],
    "width_masks": [
        """
def width_masks(log_alpha, uniforms, target, linear, square):
    b, l, r = 2 / 3, -0.1, 1.1
    s = torch.sigmoid((torch.logit(uniforms) + log_alpha) / b)
    mask = torch.minimum(torch.ones_like(s), torch.maximum(torch.zeros_like(s), s * (r - l) + l))
    k = 1 / (1 + torch.exp(-(log_alpha + b * math.log(11))))
    difference = k.sum(1) / k.shape[1] - target
    return mask, torch.dot(linear, difference) + torch.dot(square, difference.square())
""",
        """
def width_masks(log_alpha, uniforms, target, linear, square):
    logits = (uniforms.log() - (1 - uniforms).log() + log_alpha) * 1.5
    mask = F.hardtanh(1.2 * logits.sigmoid() - 0.1, 0.0, 1.0)
    total = 0.0
    for row, a, b in zip(log_alpha, linear, square):
        share = (row - (2 / 3) * math.log(1 / 11)).sigmoid().mean()
        total = total + a * (share - target) + b * (share - target) ** 2
    return mask, total
""",
    ],
}

VARIANT_ANSWERS = {
    "student_weights": {"layers=odd": STUDENT.format(first=1)},
    "divergence": {f"beta={beta}": DIVERGENCE.format(beta=beta) for beta in ("0.6", "0.35", "0.7")},
}
