"""Right answers of lab 07 that are written differently from the solution: no check may refuse one."""

ANSWERS = {
    "cache_bytes": [
        """
def cache_bytes(model, lengths, page_size):
    layers, kv_heads, head_dim, itemsize = (model[x] for x in ("layers", "kv_heads", "head_dim", "itemsize"))
    token = (layers * kv_heads * head_dim * itemsize) + (layers * kv_heads * head_dim * itemsize)
    longest, used, paged = 0, 0, 0
    for n in lengths:
        longest = max(longest, n)
        used += n * token
        paged += math.ceil(n / page_size) * page_size * token
    return {"paged": paged, "padded": longest * len(lengths) * token, "used": used, "token": token,
            "maximum": len(lengths) * model["max_length"] * token}
""",
        """
def cache_bytes(model, lengths, page_size):
    token = math.prod([2, model["layers"], model["kv_heads"], model["head_dim"], model["itemsize"]])
    n = torch.tensor(lengths, dtype=torch.long)
    pages = torch.div(n + page_size - 1, page_size, rounding_mode="floor")
    longest = int(n.max()) if len(n) else 0
    return dict(token=token, used=token * int(n.sum()), maximum=token * len(n) * model["max_length"],
                padded=token * len(n) * longest, paged=token * page_size * int(pages.sum()))
""",
    ],
    "BlockManager": [
        """
class BlockManager:
    def __init__(self, pages):
        self.held = [0] * pages
        self.stack = deque(range(pages))

    @property
    def free_pages(self):
        return self.held.count(0)

    def references(self, page):
        return self.held[page]

    def allocate(self, count):
        if len(self.stack) < count:
            raise OutOfPages("too few")
        pages = []
        while len(pages) < count:
            pages.append(self.stack.popleft())
            self.held[pages[-1]] = 1
        return pages

    def _in_use(self, page):
        if page < 0 or page >= len(self.held) or not self.held[page]:
            raise ValueError(page)

    def share(self, page):
        self._in_use(page)
        self.held[page] += 1

    def release(self, page):
        self._in_use(page)
        self.held[page] -= 1
        if not self.held[page]:
            self.stack.appendleft(page)
""",
        """
class BlockManager:
    def __init__(self, pages):
        self.references_of = torch.zeros(pages, dtype=torch.long)
        self.newest_last = torch.arange(pages).flip(0).tolist()

    free_pages = property(lambda self: len(self.newest_last))

    def references(self, page):
        return int(self.references_of[page])

    def allocate(self, count):
        left = len(self.newest_last) - count
        if left < 0:
            raise OutOfPages(count)
        self.newest_last, taken = self.newest_last[:left], self.newest_last[left:][::-1]
        for page in taken:
            self.references_of[page] += 1
        return taken

    def share(self, page, by=1):
        if page not in range(len(self.references_of)) or page in self.newest_last:
            raise ValueError(f"{page} is free, or no page")
        self.references_of[page] += by

    def release(self, page):
        self.share(page, -1)
        if self.references_of[page] == 0:
            self.newest_last.append(page)
""",
    ],
    "PagedSequence": [
        """
class PagedSequence:
    def __init__(self, manager, k_pages, v_pages):
        self.manager, self.k_pages, self.v_pages = manager, k_pages, v_pages
        self.page_size = k_pages.shape[2]
        self.pages, self.length = [], 0

    def append(self, k, v):
        room = len(self.pages) * self.page_size - self.length
        more = max(0, len(k) - room)
        self.pages = self.pages + self.manager.allocate(math.ceil(more / self.page_size))
        positions = torch.arange(self.length, self.length + len(k))
        page = torch.tensor(self.pages, dtype=torch.long)[positions // self.page_size]
        self.k_pages[page, :, positions % self.page_size] = k
        self.v_pages[page, :, positions % self.page_size] = v
        self.length += len(k)

    def free(self):
        while self.pages:
            self.manager.release(self.pages.pop())
        self.length = 0
""",
        """
class PagedSequence:
    def __init__(self, manager, k_pages, v_pages):
        self.manager, self.k_pages, self.v_pages = manager, k_pages, v_pages
        self.page_size = k_pages.shape[2]
        self.pages = []
        self.length = 0

    def append(self, k, v):
        taken = []
        try:
            while (len(self.pages) + len(taken)) * self.page_size < self.length + k.shape[0]:
                taken += self.manager.allocate(1)
        except OutOfPages:
            for page in taken[::-1]:
                self.manager.release(page)
            raise
        self.pages.extend(taken)
        row = 0
        while row < k.shape[0]:
            page, place = divmod(self.length, self.page_size)
            count = min(self.page_size - place, k.shape[0] - row)
            for pages, x in ((self.k_pages, k), (self.v_pages, v)):
                pages[self.pages[page], :, place : place + count] = x[row : row + count].transpose(0, 1)
            row, self.length = row + count, self.length + count

    def free(self):
        for page in reversed(self.pages):
            self.manager.release(page)
        self.length = 0
        self.pages.clear()
""",
    ],
    "SharedSequence": [
        """
class SharedSequence(PagedSequence):
    def fork(self):
        child = type(self)(self.manager, self.k_pages, self.v_pages)
        child.length = self.length
        for page in self.pages:
            child.pages.append(page)
            self.manager.share(page)
        return child

    def append(self, k, v):
        filled = self.length % self.page_size
        if len(k) == 0 or filled == 0 or self.manager.references(self.pages[-1]) == 1:
            return super().append(k, v)
        rest = len(k) - (self.page_size - filled)
        if self.manager.free_pages < 1 + max(0, math.ceil(rest / self.page_size)):
            raise OutOfPages("the copy and the rest do not fit")
        (copy,) = self.manager.allocate(1)
        for pages in (self.k_pages, self.v_pages):
            pages[copy, :, :filled] = pages[self.pages[-1], :, :filled].clone()
        self.manager.release(self.pages[-1])
        self.pages[-1] = copy
        return super().append(k, v)
""",
        """
class SharedSequence(PagedSequence):
    def fork(self):
        child = SharedSequence(self.manager, self.k_pages, self.v_pages)
        child.pages, child.length = self.pages[:], self.length
        list(map(self.manager.share, child.pages))
        return child

    def append(self, k, v):
        filled = self.length % self.page_size
        last = self.pages[-1] if filled else None
        if not len(k) or last is None or self.manager.references(last) < 2:
            super().append(k, v)
            return
        old_k, old_v = self.k_pages[last, :, :filled].transpose(0, 1), self.v_pages[last, :, :filled].transpose(0, 1)
        self.pages.pop()
        self.length -= filled
        try:
            super().append(torch.cat([old_k, k]), torch.cat([old_v, v]))
        except OutOfPages:
            self.pages.append(last)
            self.length += filled
            raise
        self.manager.release(last)
""",
    ],
    "paged_attention": [
        """
def paged_attention(q, k_pages, v_pages, block_table, length):
    heads, dim = q.shape
    group, size = heads // k_pages.shape[1], k_pages.shape[2]
    pages = [(int(block_table[i]), min(size, length - i * size)) for i in range(math.ceil(length / size))]
    scores = torch.cat([
        torch.einsum("hd,hkd->hk", q.float(), k_pages[page, :, :n].float().repeat_interleave(group, 0))
        for page, n in pages
    ], dim=1)
    weights = torch.softmax(scores * dim**-0.5, dim=1).split([n for _, n in pages], dim=1)
    out = torch.zeros(heads, dim, device=q.device)
    for share, (page, n) in zip(weights, pages):
        out += torch.einsum("hk,hkd->hd", share, v_pages[page, :, :n].float().repeat_interleave(group, 0))
    return out.to(q.dtype)
""",
        """
def paged_attention(q, k_pages, v_pages, block_table, length):
    heads, dim = q.shape
    kv_heads, size = k_pages.shape[1], k_pages.shape[2]
    outs, lses = [], []
    for h in range(heads):
        kv = h // (heads // kv_heads)
        out, lse = torch.zeros(dim, device=q.device), torch.tensor(float("-inf"), device=q.device)
        for column in range((length + size - 1) // size):
            end = min(length - column * size, size)
            k = k_pages[block_table[column], kv][:end].float()
            v = v_pages[block_table[column], kv][:end].float()
            s = k @ q[h].float() / dim**0.5
            here = s.logsumexp(0)
            both = torch.logaddexp(lse, here)
            out = (lse - both).exp() * out + (here - both).exp() * (s.softmax(0) @ v)
            lse = both
        outs.append(out)
    return torch.stack(outs).to(q.dtype)
""",
    ],
    "PrefixCache": [
        """
class PrefixCache:
    def __init__(self, page_size):
        self.size, self.known = page_size, {}

    def commit(self, tokens, pages):
        for i in range(len(tokens) // self.size):
            self.known.setdefault(tuple(tokens[: (i + 1) * self.size]), pages[i])

    def match(self, prompt):
        found, end = [], self.size
        while end < len(prompt) and tuple(prompt[:end]) in self.known:
            found.append(self.known[tuple(prompt[:end])])
            end += self.size
        return found

    def forget(self, page):
        for key in [key for key, value in self.known.items() if value == page]:
            del self.known[key]
""",
        """
class PrefixCache:
    def __init__(self, page_size):
        self.size = page_size
        self.root = {}  # a tree: tokens of a page -> [page or None, children]

    def commit(self, tokens, pages):
        node = self.root
        for i, page in zip(range(0, len(tokens) - self.size + 1, self.size), pages):
            entry = node.setdefault(tuple(tokens[i : i + self.size]), [None, {}])
            if entry[0] is None:
                entry[0] = page
            node = entry[1]

    def match(self, prompt):
        node, pages = self.root, []
        for i in range(0, len(prompt) - self.size, self.size):
            page, node = node.get(tuple(prompt[i : i + self.size]), (None, {}))
            if page is None:
                return pages
            pages.append(page)
        return pages

    def forget(self, page):
        waiting = [self.root]
        while waiting:
            for entry in waiting.pop().values():
                if entry[0] == page:
                    entry[0] = None
                waiting.append(entry[1])
""",
    ],
    "Scheduler": [
        """
class Scheduler:
    def __init__(self, pages, page_size, max_batch):
        self.pages, self.page_size, self.max_batch = pages, page_size, max_batch
        self.preemptions = 0
        self.everybody = []  # in order of arrival: [name, tokens, left, held]

    @property
    def free_pages(self):
        return self.pages - sum(one[3] for one in self.everybody)

    def needed(self, tokens):
        return math.ceil(tokens / self.page_size)

    def submit(self, name, prompt, new):
        if self.needed(prompt + new - 1) > self.pages:
            raise ValueError("too long")
        self.everybody.append([name, prompt, new, 0])

    def step(self):
        running = [one for one in self.everybody if one[3]]
        kept = []
        while running:
            one = running[0]
            missing = self.needed(one[1]) - one[3]
            if missing <= self.free_pages:
                one[3] += missing
                kept.append(running.pop(0))
            else:
                running.pop()[3] = 0
                self.preemptions += 1
        for one in self.everybody:
            if one in kept:
                continue
            if len(kept) >= self.max_batch or self.needed(one[1]) > self.free_pages:
                break
            one[3] = self.needed(one[1])
            kept.append(one)
        for one in kept:
            one[1:3] = one[1] + 1, one[2] - 1
        self.everybody = [one for one in self.everybody if one[2]]
        return [one[0] for one in kept]
""",
        """
class Scheduler:
    def __init__(self, pages, page_size, max_batch):
        self.all_pages = self.free_pages = pages
        self.page_size, self.max_batch = page_size, max_batch
        self.queue, self.active, self.sizes, self.preemptions = [], [], {}, 0

    def pages_of(self, tokens):
        return (tokens + self.page_size - 1) // self.page_size

    def submit(self, name, prompt, new):
        if self.pages_of(prompt + new - 1) > self.all_pages:
            raise ValueError(name)
        self.sizes[name] = [prompt, new]
        self.queue.append(name)

    def step(self):
        held = {name: self.pages_of(max(1, self.sizes[name][0] - 1)) for name in self.active}
        for name in list(self.active):
            if name not in self.active:
                continue
            held[name] = self.pages_of(self.sizes[name][0])
            while name in self.active and sum(held[other] for other in self.active) > self.all_pages:
                self.queue.insert(0, self.active.pop())
                self.preemptions += 1
        used = sum(held[name] for name in self.active)
        while self.queue and len(self.active) < self.max_batch:
            more = self.pages_of(self.sizes[self.queue[0]][0])
            if used + more > self.all_pages:
                break
            used += more
            self.active.append(self.queue.pop(0))
        ran = self.active
        self.free_pages = self.all_pages - used
        self.active = []
        for name in ran:
            tokens, left = self.sizes[name]
            self.sizes[name] = [tokens + 1, left - 1]
            if left > 1:
                self.active.append(name)
            else:
                self.free_pages += self.pages_of(tokens)
        return ran
""",
    ],
    "sink_attention": [
        """
def sink_attention(q, k, v, window, sinks):
    length = k.shape[1]
    keep = (torch.arange(length) < sinks) | (torch.arange(length) >= length - window)
    k, v = k[:, keep], v[:, keep]
    places = torch.arange(k.shape[1], device=q.device)
    turned = rotate(torch.cat([k, q[:, None]], dim=1), torch.cat([places, places[-1:]]))
    scores = torch.einsum("hd,hkd->hk", turned[:, -1], turned[:, :-1]) * q.shape[1] ** -0.5
    return torch.einsum("hk,hkd->hd", torch.softmax(scores, -1), v)
""",
        """
def sink_attention(q, k, v, window, sinks):
    heads, length, dim = k.shape
    if length > sinks + window:
        k = torch.cat([k[:, :sinks], k[:, length - window :]], dim=1)
        v = torch.cat([v[:, :sinks], v[:, length - window :]], dim=1)
    count = k.shape[1]
    keys = rotate(k, torch.arange(count, device=q.device))
    out = []
    for h in range(heads):
        query = rotate(q[h : h + 1], torch.tensor([count - 1], device=q.device))[0]
        s = (keys[h] @ query) / math.sqrt(dim)
        e = (s - s.max()).exp()
        out.append(e @ v[h] / e.sum())
    return torch.stack(out)
""",
    ],
}

MANAGER = """
import heapq


class BlockManager:
    def __init__(self, pages):
        self.free, self.counts = {free}, {{}}

    @property
    def free_pages(self):
        return len(self.free)

    def references(self, page):
        return self.counts.get(page, 0)

    def allocate(self, count):
        if count > len(self.free):
            raise OutOfPages()
        pages = [{take} for _ in range(count)]
        for page in pages:
            self.counts[page] = 1
        return pages

    def share(self, page):
        if not self.counts.get(page):
            raise ValueError(page)
        self.counts[page] += 1

    def release(self, page):
        if not self.counts.get(page):
            raise ValueError(page)
        self.counts[page] -= 1
        if not self.counts[page]:
            {give}
"""

VARIANT_ANSWERS = {
    "BlockManager": {
        "order=lowest": MANAGER.format(
            free="list(range(pages))", take="heapq.heappop(self.free)", give="heapq.heappush(self.free, page)"
        ),
        "order=highest": MANAGER.format(
            free="[-page for page in reversed(range(pages))]", take="-heapq.heappop(self.free)",
            give="heapq.heappush(self.free, -page)",
        ),
        "order=oldest": MANAGER.format(
            free="list(range(pages))", take="self.free.pop(0)", give="self.free.append(page)"
        ),
        "order=newest": """
class BlockManager:
    def __init__(self, pages):
        self.pages, self.counts, self.stack = pages, {}, []
        self.next = 0  # pages from here on were never handed out

    @property
    def free_pages(self):
        return len(self.stack) + self.pages - self.next

    def references(self, page):
        return self.counts.get(page, 0)

    def allocate(self, count):
        if count > self.free_pages:
            raise OutOfPages()
        pages = []
        for _ in range(count):
            if self.stack:
                pages.append(self.stack.pop())
            else:
                pages.append(self.next)
                self.next += 1
            self.counts[pages[-1]] = 1
        return pages

    def share(self, page):
        if self.references(page) == 0:
            raise ValueError(page)
        self.counts[page] += 1

    def release(self, page):
        if self.references(page) == 0:
            raise ValueError(page)
        self.counts[page] -= 1
        if self.counts[page] == 0:
            del self.counts[page]
            self.stack.append(page)
""",
    }
}
