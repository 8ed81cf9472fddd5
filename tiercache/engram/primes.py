"""Prime numbers as sizes of heads."""

from collections.abc import Iterator
from itertools import islice


def is_prime(number: int) -> bool:
    """By trial division: for numbers up to some 10**12."""
    if number < 4:
        return number > 1
    return number % 2 == 1 and all(number % divisor for divisor in range(3, int(number**0.5) + 2, 2))


def primes_from(first: int) -> Iterator[int]:
    """The primes from `first` up, ascending."""
    number = first
    while True:
        if is_prime(number):
            yield number
        number += 1


def next_primes(first: int, count: int, seen: set[int]) -> tuple[int, ...]:
    """The `count` smallest primes from `first` up that are not in `seen`; adds them to it."""
    primes = tuple(islice((prime for prime in primes_from(first) if prime not in seen), count))
    seen.update(primes)
    return primes
