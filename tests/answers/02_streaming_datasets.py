"""Right answers of lab 02 that are written differently from the solution: no check may refuse one."""

ANSWERS = {
    "write_shards": [
        '''
def write_shards(documents, folder, shard_tokens):
    index, file = [], None
    for document in documents:
        data = b"".join(token.to_bytes(2, "little") for token in document)
        if file is None or index[-1][-1] + len(document) > shard_tokens:
            if file is not None:
                file.close()
            file = open(folder / shard_name(len(index)), "wb")
            index.append([0])
        file.write(data)
        index[-1].append(index[-1][-1] + len(document))
    if file is not None:
        file.close()
    return index
''',
        '''
def write_shards(documents, folder, shard_tokens):
    waiting = iter(documents)
    document, index = next(waiting, None), []
    while document is not None:
        shard, offsets = list(document), [0, len(document)]
        while (document := next(waiting, None)) is not None and offsets[-1] + len(document) <= shard_tokens:
            shard += document
            offsets = offsets + [len(shard)]
        data = torch.tensor(shard, dtype=torch.int64).to(torch.uint16)
        (folder / shard_name(len(index))).write_bytes(data.numpy().astype("<u2").tobytes())
        index.append(offsets)
    return index
''',
    ],
    "read_document": [
        '''
def read_document(folder, index, number):
    for shard, offsets in enumerate(index):
        for first, last in zip(offsets, offsets[1:]):
            if number == 0:
                with open(folder / shard_name(shard), "rb") as file:
                    file.seek(2 * first)
                    data = file.read(2 * (last - first))
                return torch.tensor([low + 256 * high for low, high in zip(data[::2], data[1::2])])
            number -= 1
''',
        '''
def read_document(folder, index, number):
    counts = np.cumsum([len(offsets) - 1 for offsets in index])
    shard = int(np.searchsorted(counts, number, side="right"))
    place = number - int(counts[shard]) + len(index[shard]) - 1
    first = index[shard][place]
    length = index[shard][place + 1] - first
    tokens = np.fromfile(folder / shard_name(shard), dtype="<u2", count=length, offset=2 * first)
    return torch.as_tensor(tokens.astype("int64"))
''',
        '''
def read_document(folder, index, number):
    shard, place = [(s, p) for s, offsets in enumerate(index) for p in range(len(offsets) - 1)][number]
    size = index[shard][-1]
    path = str(folder / shard_name(shard))
    tokens = torch.from_file(path, shared=False, size=size, dtype=torch.int16)
    return tokens[index[shard][place] : index[shard][place + 1]].long() % 65536
''',
    ],
    "worker_batches": [
        '''
def worker_batches(count, global_batch, seed, epoch, rank, ranks, worker, workers):
    order = epoch_order(count, seed, epoch)
    steps = [order[i : i + global_batch] for i in range(0, count, global_batch)]
    mine = []
    for step in steps:
        pieces, begin = [], 0
        for r in range(ranks):
            size = len(step) // ranks + (1 if r < len(step) % ranks else 0)
            pieces.append(step[begin : begin + size])
            begin += size
        mine.append(pieces[rank])
    return mine[worker::workers]
''',
        '''
def worker_batches(count, global_batch, seed, epoch, rank, ranks, worker, workers):
    order = torch.tensor(epoch_order(count, seed, epoch), dtype=torch.int64)
    batches = []
    for step, batch in enumerate(order.split(global_batch) if count else []):
        if step % workers == worker:
            batches.append(batch.tensor_split(ranks)[rank].tolist())
    return batches
''',
    ],
    "shuffle_buffer": [
        '''
def shuffle_buffer(stream, size, uniforms):
    stream = iter(stream)
    buffer = list(itertools.islice(stream, size))
    while buffer:
        place = int(next(uniforms) * len(buffer))
        item = buffer[place]
        try:
            buffer[place] = next(stream)
        except StopIteration:
            del buffer[place]
        yield item
''',
        '''
def shuffle_buffer(stream, size, uniforms):
    held, end = deque(), object()
    stream = iter(stream)
    while len(held) < size and (item := next(stream, end)) is not end:
        held.append(item)
    while held:
        place = int(next(uniforms) * len(held))
        held.rotate(-place)
        yield held.popleft()
        if (item := next(stream, end)) is not end:
            held.appendleft(item)
        held.rotate(place)
''',
    ],
    "ResumableStream": [
        '''
class ResumableStream:
    def __init__(self, fetch, count, seed, rank, ranks, prefetch):
        self.fetch, self.count, self.seed = fetch, count, seed
        self.rank, self.ranks, self.prefetch = rank, ranks, prefetch
        self.begin(0)

    def begin(self, position):
        self.first, self.steps, self.ahead = position, 0, []
        self.source = self.samples_from(position + self.rank)

    def samples_from(self, position):
        while True:
            order = epoch_order(self.count, self.seed, position // self.count)
            yield self.fetch(order[position % self.count])
            position += self.ranks

    def __iter__(self):
        return self

    def __next__(self):
        sample = self.ahead.pop(0) if self.ahead else next(self.source)
        while len(self.ahead) < self.prefetch:
            self.ahead.append(next(self.source))
        self.steps += 1
        return sample

    def state_dict(self):
        epoch, place = divmod(self.first + self.steps * self.ranks, self.count)
        return {"epoch": epoch, "place": place}

    def load_state_dict(self, state):
        self.begin(state["epoch"] * self.count + state["place"])
''',
        '''
class ResumableStream:
    def __init__(self, fetch, count, seed, rank, ranks, prefetch):
        self.fetch, self.count, self.seed = fetch, count, seed
        self.rank, self.ranks, self.prefetch = rank, ranks, prefetch
        self.epoch = self.place = 0
        self.queue = []

    def __iter__(self):
        return self

    def __next__(self):
        while len(self.queue) < self.prefetch + 1:
            epoch, place = self.epoch, self.place + self.rank + self.ranks * len(self.queue)
            while place >= self.count:
                epoch, place = epoch + 1, place - self.count
            self.queue.append(self.fetch(epoch_order(self.count, self.seed, epoch)[place]))
        self.place += self.ranks
        while self.place >= self.count:
            self.epoch, self.place = self.epoch + 1, self.place - self.count
        sample, *self.queue = self.queue
        return sample

    def state_dict(self):
        return [self.epoch, self.place]

    def load_state_dict(self, state):
        self.epoch, self.place = state
        self.queue = []
''',
    ],
    "padded_batches": [
        '''
def padded_batches(samples, batch_size, window, pad_id):
    batches = []
    while samples:
        pool, samples = samples[:window], samples[window:]
        order = sorted(range(len(pool)), key=lambda n: (len(pool[n]), n))
        while order:
            rows, order = [pool[n] for n in order[:batch_size]], order[batch_size:]
            lengths = torch.tensor([len(row) for row in rows])
            real = torch.arange(int(lengths.max())) < lengths[:, None]
            ids = torch.full(real.shape, pad_id)
            ids[real] = torch.tensor([token for row in rows for token in row])
            batches.append({
                "attention_mask": real.long(),
                "input_ids": ids,
                "labels": torch.where(real, ids, torch.tensor(-100)),
            })
    return batches
''',
        '''
def padded_batches(samples, batch_size, window, pad_id):
    pad = torch.nn.utils.rnn.pad_sequence
    batches = []
    for begin in range(0, len(samples), window):
        pool = sorted(samples[begin : begin + window], key=len)
        for first in range(0, len(pool), batch_size):
            rows = [torch.tensor(sample) for sample in pool[first : first + batch_size]]
            batches.append(dict(
                input_ids=pad(rows, batch_first=True, padding_value=pad_id),
                attention_mask=pad([torch.ones_like(row) for row in rows], batch_first=True),
                labels=pad(rows, batch_first=True, padding_value=-100),
            ))
    return batches
''',
    ],
    "pack_documents": [
        '''
def pack_documents(documents, length):
    pieces = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    rows, room = [], 0
    for piece in pieces:
        if len(piece) > room:
            rows.append([])
            room = length
        rows[-1].append(piece)
        room -= len(piece)
    packed = []
    for row in rows:
        bounds = [0]
        for piece in row:
            bounds.append(bounds[-1] + len(piece))
        blocks = [torch.ones(len(piece), len(piece), dtype=torch.bool).tril() for piece in row]
        packed.append({
            "input_ids": torch.cat([torch.tensor(piece) for piece in row]),
            "labels": torch.cat([torch.tensor([-100] + piece[1:]) for piece in row]),
            "position_ids": torch.cat([torch.arange(len(piece)) for piece in row]),
            "cu_seqlens": torch.tensor(bounds).to(torch.int32),
            "mask": torch.block_diag(*blocks).bool(),
        })
    return packed
''',
        '''
def pack_documents(documents, length):
    rows = []
    ids, positions = [], []

    def finish():
        x, place = torch.tensor(ids), torch.tensor(positions)
        starts = place.eq(0).nonzero().flatten()
        number = place.eq(0).cumsum(0)
        query, key = torch.meshgrid(torch.arange(len(ids)), torch.arange(len(ids)), indexing="ij")
        rows.append({
            "input_ids": x,
            "position_ids": place,
            "cu_seqlens": torch.cat([starts, torch.tensor([len(ids)])]).int(),
            "labels": torch.where(place > 0, x, -100),
            "mask": (key <= query) & (number[query] == number[key]),
        })

    for document in documents:
        while document:
            piece, document = document[:length], document[length:]
            if len(ids) + len(piece) > length:
                finish()
                ids, positions = [], []
            ids = ids + piece
            positions = positions + list(range(len(piece)))
    finish()
    return rows
''',
    ],
    "prefetch": [
        '''
def prefetch(source, depth):
    held, changed = deque(), threading.Condition()
    done = []

    def work():
        error = None
        try:
            for item in source:
                with changed:
                    changed.wait_for(lambda: len(held) < depth)
                    held.append(item)
                    changed.notify_all()
        except BaseException as caught:
            error = caught
        with changed:
            done.append(error)
            changed.notify_all()

    threading.Thread(target=work, daemon=True).start()
    while True:
        with changed:
            changed.wait_for(lambda: held or done)
            if not held:
                if done[0] is not None:
                    raise done[0]
                return
            item = held.popleft()
            changed.notify_all()
        yield item
''',
        '''
def prefetch(source, depth):
    box, room = queue.Queue(), threading.Semaphore(depth + 1)

    def work():
        try:
            source_items = iter(source)
            while True:
                room.acquire()
                try:
                    box.put(("item", next(source_items)))
                except StopIteration:
                    break
        except Exception as error:
            box.put(("error", error))
        else:
            box.put(("end", None))

    threading.Thread(target=work, daemon=True).start()
    kind, value = box.get()
    while kind == "item":
        room.release()
        yield value
        kind, value = box.get()
    if kind == "error":
        raise value
''',
    ],
}

VARIANT_ANSWERS = {
    "worker_batches": {
        "remainder=last": '''
def worker_batches(count, global_batch, seed, epoch, rank, ranks, worker, workers):
    order = epoch_order(count, seed, epoch)
    batches = []
    for begin in range(worker * global_batch, count, workers * global_batch):
        batch = order[begin : begin + global_batch]
        size, extra = divmod(len(batch), ranks)
        first = rank * size + max(0, rank - (ranks - extra))
        batches.append(batch[first : first + size + (rank >= ranks - extra)])
    return batches
''',
    },
    "shuffle_buffer": {
        "drain=swap": '''
def shuffle_buffer(stream, size, uniforms):
    buffer = []
    for item in stream:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(next(uniforms) * size)
        yield buffer[place]
        buffer[place] = item
    while buffer:
        place = int(next(uniforms) * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()
''',
    },
    "padded_batches": {
        "order=longest": '''
def padded_batches(samples, batch_size, window, pad_id):
    batches = []
    for begin in range(0, len(samples), window):
        pool = sorted(samples[begin : begin + window], key=len, reverse=True)
        for first in range(0, len(pool), batch_size):
            rows = pool[first : first + batch_size]
            ids = torch.full((len(rows), len(rows[0])), pad_id)
            mask = torch.zeros_like(ids)
            for row, sample in enumerate(rows):
                ids[row, : len(sample)] = torch.tensor(sample)
                mask[row, : len(sample)] = 1
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches
''',
    },
}
