-- Keep a live lease alive; its counters live at least as long.
-- KEYS: lease, then per scope: state, leases.   ARGV: lease id, lease ttl ms.
-- Answer: 1, or 0 if the lease is gone (it expired: it is not brought back, its slot may be taken).

local lease_id, ttl_ms = ARGV[1], tonumber(ARGV[2])
local now = now_us()
if redis.call('PEXPIRE', KEYS[1], int(ttl_ms)) == 0 then return 0 end
for i = 2, #KEYS, 2 do
  redis.call('PEXPIRE', KEYS[i], int(math.max(STATE_TTL_MS, 2 * ttl_ms)), 'GT')
  redis.call('PEXPIRE', KEYS[i + 1], int(math.max(STATE_TTL_MS, 2 * ttl_ms)), 'GT')
  redis.call('ZADD', KEYS[i + 1], 'XX', int(math.floor(now / 1000) + ttl_ms), lease_id)
end
return 1
