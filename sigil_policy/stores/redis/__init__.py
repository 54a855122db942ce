"""What several processes share in a Redis or Valkey server, over one connection for each event loop.

    link = RedisLink("redis://limits.internal:6379/0")
    limits, slots = RedisLimits(link), RedisSlots(link)

It needs the extra `redis`, and asyncio.
"""

from sigil_policy.stores.redis.limits import RedisLimits
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.replays import RedisReplays
from sigil_policy.stores.redis.revocations import RedisRevocations
from sigil_policy.stores.redis.slots import RedisSlots
from sigil_policy.stores.redis.tickets import RedisTickets

__all__ = ["RedisLimits", "RedisLink", "RedisReplays", "RedisRevocations", "RedisSlots", "RedisTickets"]
