-- Put what the database knows in place of what is counted here for one organisation, under a new epoch.
-- KEYS: epoch, the organisation's leases.   ARGV: epoch, lease ttl ms, day, prefix of scope keys, prefix of lease keys,
-- number of scopes, per scope: id, requests and tokens of the last minute, tokens of the day, tokens of the last minute
-- that open requests may give back; then per open request: id, tokens, whether placed in the last minute (1, 0), in this
-- day (1, 0), number of scopes, their ids.
-- Every lease stands in the organisation's set. Those whose request the database does not know are gone: who holds one
-- finds another epoch when it writes its hold. Slices are gone, too, for the same reason.

local epoch, ttl_ms, day = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local scope_prefix, lease_prefix = ARGV[4], ARGV[5]
local now = now_us()
local at = 6
local function take()
  at = at + 1
  return ARGV[at - 1]
end

for _, lease_id in ipairs(redis.call('ZRANGE', KEYS[2], '0', '-1')) do
  redis.call('DEL', lease_prefix .. lease_id)
end
for _ = 1, tonumber(take()) do
  local scope = scope_prefix .. take()
  local requests, tokens, of_day, open = tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take())
  redis.call('DEL', scope .. ':state', scope .. ':leases')
  local s = { now = now, rd = requests * UNIT, rt = now, td = tokens * UNIT, tt = now, open = open, burnt = 0, dn = day,
    du = of_day, slices = {} }
  save(scope .. ':state', s, ttl_ms, -1, -1, 1) -- kept for two days, which outlives every debt of a minute
end
local expiry = int(math.floor(now / 1000) + ttl_ms)
while at <= #ARGV do
  local id, tokens, in_minute, in_day = take(), take(), take() == '1', take() == '1'
  local lease = { 'tokens', tokens }
  for _ = 1, tonumber(take()) do
    local scope = scope_prefix .. take()
    if in_minute then
      lease[#lease + 1] = scope .. ':state'
      lease[#lease + 1] = '0'
    end
    if in_day then
      lease[#lease + 1] = 'day:' .. scope .. ':state'
      lease[#lease + 1] = int(day)
    end
    redis.call('ZADD', scope .. ':leases', expiry, id)
    redis.call('PEXPIRE', scope .. ':leases', int(math.max(STATE_TTL_MS, 2 * ttl_ms)))
  end
  redis.call('HSET', lease_prefix .. id, unpack(lease))
  redis.call('PEXPIRE', lease_prefix .. id, int(ttl_ms))
end
redis.call('SET', KEYS[1], epoch)
return 1
