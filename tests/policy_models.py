"""Each policy once more, in plain lists and dicts, for reading: what the compiled ones must equal slot by slot."""

from tiercache.policies import wtinylfu
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS


def oldest_unpinned(queue, pinned, patience):
    """First slot of it without a pin, left in place; pinned ones met go to its end. (Slot or BYPASS, patience left.)"""
    for _ in range(len(queue)):
        if patience < 0:
            break
        if queue[0] not in pinned:
            return queue[0], patience
        queue.append(queue.pop(0))
        patience -= 1
    return BYPASS, patience


class Model:
    """A policy over slots; `keys` is the driver's list of what each slot holds."""

    def __init__(self, capacity, **options):
        self.capacity, self.used = capacity, 0
        self.start(**options)

    def start(self):
        self.queue = []

    def miss(self, keys, pinned, key):
        if self.used < self.capacity:
            self.used += 1
            self.fill(self.used - 1, key)
            return self.used - 1
        return self.replace(keys, pinned, key)

    def fill(self, slot, key):
        self.queue.append(slot)


class Fifo(Model):
    def hit(self, keys, slot):
        pass

    def replace(self, keys, pinned, key):
        for _ in range(MAX_PINNED_VICTIMS + 1):
            self.queue.append(self.queue.pop(0))
            if self.queue[-1] not in pinned:
                return self.queue[-1]
        return BYPASS


class Lru(Model):
    def hit(self, keys, slot):
        self.queue.remove(slot)
        self.queue.append(slot)

    def replace(self, keys, pinned, key):
        slot, _ = oldest_unpinned(self.queue, pinned, MAX_PINNED_VICTIMS)
        if slot != BYPASS:
            self.hit(keys, slot)
        return slot


class Lfu(Model):
    def start(self):
        self.by_count = {}

    def fill(self, slot, key):
        self.by_count.setdefault(1, []).append(slot)

    def hit(self, keys, slot):
        count = next(count for count, slots in self.by_count.items() if slot in slots)
        self.by_count[count].remove(slot)
        self.by_count.setdefault(count + 1, []).append(slot)

    def replace(self, keys, pinned, key):
        patience = MAX_PINNED_VICTIMS
        for count in sorted(self.by_count):
            slot, patience = oldest_unpinned(self.by_count[count], pinned, patience)
            if slot != BYPASS:
                self.by_count[count].remove(slot)
                self.fill(slot, key)
                return slot
        return BYPASS


class Sieve(Model):
    def start(self):
        self.queue, self.visited, self.hand = [], set(), 0

    def hit(self, keys, slot):
        self.visited.add(slot)

    def replace(self, keys, pinned, key):
        patience = MAX_PINNED_VICTIMS
        while True:
            self.hand %= len(self.queue)
            slot = self.queue[self.hand]
            if slot in pinned:
                patience -= 1
            elif slot not in self.visited:
                self.queue.pop(self.hand)
                self.hand = self.hand if self.hand < len(self.queue) else 0
                self.queue.append(slot)
                return slot
            else:
                self.visited.discard(slot)
            self.hand += 1
            if patience < 0:
                return BYPASS


class S3fifo(Model):
    def start(self, small=0.25, ghost=0.75, threshold=1):
        self.share, self.threshold = max(1, int(self.capacity * small)), threshold
        self.small, self.main, self.ghost, self.most_ghosts = [], [], [], int(self.capacity * ghost)
        self.uses = {}

    def hit(self, keys, slot):
        self.uses[slot] = min(self.uses[slot] + 1, 3)

    def fill(self, slot, key):
        self.uses[slot] = 0
        (self.small if len(self.small) < self.share else self.main).append(slot)

    def replace(self, keys, pinned, key):
        known = key in self.ghost
        slot, evicted = self.evict(keys, pinned)
        if slot == BYPASS:
            if not known:
                self.remember(key)
            return slot
        if known:
            self.ghost.remove(key)
        self.remember(evicted)
        self.uses[slot] = 0
        (self.main if known else self.small).append(slot)
        return slot

    def evict(self, keys, pinned):
        patience = MAX_PINNED_VICTIMS
        if len(self.main) <= self.capacity - self.share:
            while self.small:
                slot = self.small.pop(0)
                if self.uses[slot] >= self.threshold:
                    self.uses[slot] = 0
                    self.main.append(slot)
                elif slot not in pinned:
                    return slot, keys[slot]
                else:
                    self.small.append(slot)
                    patience -= 1
                    if patience < 0:
                        return BYPASS, EMPTY
        while patience >= 0:
            slot = self.main.pop(0)
            if self.uses[slot] == 0 and slot not in pinned:
                return slot, EMPTY
            if self.uses[slot] == 0:
                patience -= 1
            self.uses[slot] = max(self.uses[slot] - 1, 0)
            self.main.append(slot)
        return BYPASS, EMPTY

    def remember(self, key):
        if key != EMPTY and self.most_ghosts:
            self.ghost = [*self.ghost, key][-self.most_ghosts :]


class Arc(Model):
    def start(self):
        self.lists, self.ghosts, self.target = ([], []), ([], []), 0

    def fill(self, slot, key):
        self.lists[0].append(slot)

    def hit(self, keys, slot):
        (self.lists[0] if slot in self.lists[0] else self.lists[1]).remove(slot)
        self.lists[1].append(slot)

    def victim(self, pinned, often_wanted):
        size = len(self.lists[0]) << 32
        first = 0 if size and (size > self.target or (size == self.target and often_wanted)) else 1
        slot, patience = oldest_unpinned(self.lists[first], pinned, MAX_PINNED_VICTIMS)
        return slot if slot != BYPASS else oldest_unpinned(self.lists[1 - first], pinned, patience)[0]

    def evict(self, keys, slot, remember=True):
        which = 0 if slot in self.lists[0] else 1
        self.lists[which].remove(slot)
        if remember and keys[slot] != EMPTY:
            self.ghosts[which].append(keys[slot])

    def replace(self, keys, pinned, key):
        if key in self.ghosts[0] or key in self.ghosts[1]:
            which = 0 if key in self.ghosts[0] else 1
            hit, other = len(self.ghosts[which]), len(self.ghosts[1 - which])
            step = max(1 << 32, ((other << 32) + hit // 2) // hit)
            self.target = min(self.target + step, self.capacity << 32) if which == 0 else max(self.target - step, 0)
            slot = self.victim(pinned, which == 1)
            if slot != BYPASS:
                self.ghosts[which].remove(key)
                self.evict(keys, slot)
                self.lists[1].append(slot)
            return slot
        full = len(self.lists[0]) == self.capacity
        slot = oldest_unpinned(self.lists[0], pinned, MAX_PINNED_VICTIMS)[0] if full else self.victim(pinned, False)
        if slot == BYPASS:
            return slot
        if not full and len(self.lists[0]) + len(self.ghosts[0]) == self.capacity:
            self.ghosts[0].pop(0)
        elif not full and len(self.ghosts[0]) + len(self.ghosts[1]) == self.capacity:
            self.ghosts[1].pop(0)
        self.evict(keys, slot, remember=not full)
        self.lists[0].append(slot)
        return slot


class Wtinylfu(Model):
    """The lists; the sketch is the policy's own, which has a test for itself."""

    def start(self, window=0.50, protected=0.80, period=5):
        self.window, self.probation, self.protected = [], [], []
        self.window_share = int(self.capacity * window)
        self.protected_share = int((self.capacity - self.window_share) * protected)
        self.sketch = wtinylfu.init(self.capacity, period=period)

    def fill(self, slot, key):
        wtinylfu.count(self.sketch, key)
        self.window.append(slot)
        if len(self.window) > self.window_share:
            self.probation.append(self.window.pop(0))

    def hit(self, keys, slot):
        if keys[slot] != EMPTY:
            wtinylfu.count(self.sketch, keys[slot])
        if slot in self.probation:
            self.probation.remove(slot)
            self.protected.append(slot)
            if len(self.protected) > self.protected_share:
                self.probation.append(self.protected.pop(0))
        else:
            queue = self.window if slot in self.window else self.protected
            queue.remove(slot)
            queue.append(slot)

    def replace(self, keys, pinned, key):
        wtinylfu.count(self.sketch, key)
        candidate, patience = oldest_unpinned(self.window, pinned, MAX_PINNED_VICTIMS // 2)
        victim, patience = oldest_unpinned(self.probation, pinned, patience + MAX_PINNED_VICTIMS // 2)
        if victim == BYPASS:
            victim, _ = oldest_unpinned(self.protected, pinned, patience)
        challenger = key if candidate == BYPASS else keys[candidate]
        if victim != BYPASS and self.estimate(challenger) > self.estimate(keys[victim]):
            (self.probation if victim in self.probation else self.protected).remove(victim)
            if candidate == BYPASS:
                self.probation.append(victim)
                return victim
            self.window.remove(candidate)
            self.probation.append(candidate)
            self.window.append(victim)
            return victim
        if candidate != BYPASS:
            self.window.remove(candidate)
            self.window.append(candidate)
        return candidate

    def estimate(self, key):
        return wtinylfu.estimate(self.sketch, key)


class Static(Model):
    def start(self, hot_rows=()):
        self.hot, self.slot_of = list(dict.fromkeys(hot_rows))[: self.capacity], {}

    def hit(self, keys, slot):
        pass

    def miss(self, keys, pinned, key):
        if key not in self.hot:
            return BYPASS
        slot = self.slot_of.setdefault(key, len(self.slot_of))
        return BYPASS if slot in pinned else slot


MODELS = {
    "fifo": Fifo,
    "lru": Lru,
    "lfu": Lfu,
    "sieve": Sieve,
    "s3fifo": S3fifo,
    "arc": Arc,
    "wtinylfu": Wtinylfu,
    "static": Static,
}
