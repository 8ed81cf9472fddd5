"""Each policy once more, in plain lists and dicts, for reading: what the compiled ones must equal slot by slot."""

from tiercache.policies import gittins, wtinylfu
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS
from tiercache.policies.keyset import mix


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


class Gittins(Model):
    """Its slots, what it remembers and what it measures; sizes are the policy's own."""

    def start(self):
        state = gittins.init(self.capacity)
        self.shift, self.mask, self.interval = (int(state.book[i]) for i in (3, 4, 7))
        self.worth, self.num_samples = state.worth.tolist(), state.samples.size
        self.slots = [None] * self.capacity  # [time in units, uses, interval]
        self.ghosts = [[None] * 32 for _ in range(len(state.ghosts))]  # (mark, uses)
        self.samples, self.seen = {}, [0] * 64
        self.returns, self.reached = [[0] * 64 for _ in range(64)], [[0] * 65 for _ in range(64)]
        self.now = self.draws = self.group = self.hand = 0
        self.lesson = 0

    def age(self, units):
        age = min(units, 8191)
        octave = max(age.bit_length() - 3, 0)
        return 4 * octave + (age >> octave)

    def tick(self):
        self.now += 1
        if self.now % 128 == 0:
            if self.now >= self.lesson:
                self.lesson = self.now + min(self.interval, self.now >> 8)
                self.learn(self.group)
                self.group = (self.group + 1) % 64
            for _ in range(min(64, self.capacity)):
                slot = self.slots[self.hand]
                if slot is not None:
                    slot[0] = max(slot[0], (self.now >> self.shift) - 512)
                self.hand = (self.hand + 1) % self.capacity

    def hit(self, keys, slot):
        self.tick()
        time, uses, _ = self.slots[slot]
        age = self.age((self.now >> self.shift) - time)
        interval = 0 if age < 20 else 1
        self.slots[slot] = [self.now >> self.shift, min(uses + 1, 15), interval]
        self.observe(keys[slot], self.slots[slot])

    def miss(self, keys, pinned, key):
        self.tick()
        line, mark = self.ghost(key)
        found = next((place for place, ghost in enumerate(line) if ghost is not None and ghost[0] == mark), None)
        uses = 1
        if found is not None:
            uses = min(line[found][1] + 1, 15)
            line[found] = None
        new = [self.now >> self.shift, uses, 3]
        self.observe(key, new)
        if self.used < self.capacity:
            self.used += 1
            self.slots[self.used - 1] = new
            return self.used - 1
        slot = self.victim(pinned, self.index(new))
        if slot == BYPASS:
            self.remember(key, uses)
            return BYPASS
        if keys[slot] != EMPTY:
            self.remember(keys[slot], self.slots[slot][1])
        self.slots[slot] = new
        return slot

    def victim(self, pinned, newcomer):
        slot = self.lowest(self.draw() + self.draw())
        patience = MAX_PINNED_VICTIMS
        while slot in pinned:
            if patience <= 0:
                return BYPASS
            seen = self.draw()
            free = [slot for slot in seen if slot not in pinned]
            if free:
                slot = self.lowest(free)
                return slot if self.index(self.slots[slot]) <= newcomer else BYPASS
            patience -= len(seen)
        return slot

    def draw(self):
        num_lines = -(-self.capacity // 32)
        begin = (mix(self.draws) * num_lines >> 32) * 32
        self.draws += 1
        return list(range(begin, min(begin + 32, self.capacity)))

    def lowest(self, slots):
        return min(slots, key=lambda slot: self.index(self.slots[slot]))

    def index(self, slot):
        return self.worth[self.class_of(slot)][self.age((self.now >> self.shift) - slot[0])]

    def class_of(self, slot):
        return slot[1] * 4 + slot[2]

    def ghost(self, key):
        return self.ghosts[mix(key) * len(self.ghosts) >> 32], mix(key + 1) >> 8 & 0xFFF

    def remember(self, key, uses):
        line, mark = self.ghost(key)
        places = range(self.now & 28, (self.now & 28) + 4)
        fewest = min(places, key=lambda place: line[place][1] if line[place] else 0)
        if all(line[place] and line[place][1] > 1 for place in places):
            for place in places:
                line[place] = (line[place][0], line[place][1] - 1)
        line[fewest] = (mark, uses)

    def observe(self, key, slot):
        bits = mix(key + 1)
        if bits & self.mask:
            return
        place = mix(key) * self.num_samples >> 32
        if place in self.samples:
            time, mark, group = self.samples[place]
            age = self.follow(time, group, self.seen[place * 64 // self.num_samples])
            if mark == bits >> 16:
                self.returns[group][age] += 256
        self.samples[place] = (self.now, bits >> 16, self.class_of(slot))
        self.reached[self.class_of(slot)][0] += 256
        self.reached[self.class_of(slot)][1] -= 256

    def follow(self, time, group, before):
        age = self.age((self.now - time) >> self.shift)
        self.reached[group][(self.age((before - time) >> self.shift) if before > time else 0) + 1] += 256
        self.reached[group][age + 1] -= 256
        return age

    def learn(self, group):
        for place, (time, _, group_of) in self.samples.items():
            if place * 64 // self.num_samples == group:
                self.follow(time, group_of, self.seen[group])
        self.seen[group] = self.now
        if self.reached[group][0] >= 16 * 256:
            self.worth[group] = self.judge(group)
        elif group >= 8 or group % 4 == 2:
            like = group + 1 if group % 4 == 2 else group - 4
            self.worth[group] = self.worth[like][:48] + self.worth[group][48:]
        for counts in self.returns[group], self.reached[group]:
            counts[:48] = [count - (count >> 3) for count in counts[:48]]

    def judge(self, group):
        """Straight from the definition: the best of all times to give up, for each age."""
        at, alive, share, uses, time = 0, 1.0, 0.0, [], []
        for age in range(48):
            at += self.reached[group][age]
            doubt = 256 * (32 if age else 1)
            share = (min(self.returns[group][age], at) + doubt * share) / (at + doubt)
            uses.append(alive * share)
            alive -= uses[-1]
            time.append((alive + uses[-1] / 2) * 2 ** max(age // 4 - 1, 0))
        best = [
            max(sum(uses[age:stop]) / sum(time[age:stop]) if sum(time[age:stop]) else 0 for stop in range(age + 1, 49))
            for age in range(48)
        ]
        return [int(min(value, 1) * 2**30) for value in best] + self.worth[group][48:]


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
    "gittins": Gittins,
    "wtinylfu": Wtinylfu,
    "static": Static,
}
