-- Take a slice of each scope for one gateway, in place of the one that it had (which it has not touched), or give it back.
-- KEYS: epoch, then per scope: state, leases.   ARGV: epoch, gateway id, slice ttl ms (0: give back), percent of each
-- limit, then per scope: rpm, tpm, cmax, tpd (-1: unlimited).
-- Answer: {} for another epoch, else per scope: requests, tokens, slots, tokens of a day (0: nothing was left, or no limit).
-- A gateway gets at most its percentage, and at least 1 where that much is left.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {} end

local id, ttl_ms, percent = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_us()
local now_ms = math.floor(now / 1000)
local answer = {}

local function part(limit, left)
  if limit <= 0 or ttl_ms == 0 then return 0 end
  return math.max(0, math.min(math.max(1, math.floor(limit * percent / 100)), math.floor(left)))
end

for i = 1, (#KEYS - 1) / 2 do
  local state_key, leases_key = KEYS[2 * i], KEYS[2 * i + 1]
  local rpm, tpm = tonumber(ARGV[4 * i + 1]), tonumber(ARGV[4 * i + 2])
  local cmax, tpd = tonumber(ARGV[4 * i + 3]), tonumber(ARGV[4 * i + 4])
  local s = load(state_key, now, rpm, tpm, tpd)
  local others = {}
  for _, one in ipairs(s.slices) do
    if one.id == id then
      s.sr, s.st, s.sd = s.sr - one.r, s.st - one.t, s.sd - one.d
    else
      others[#others + 1] = one
    end
  end
  s.slices = others
  local r = part(rpm, rpm - s.rd / UNIT - s.sr)
  local t = part(tpm, tpm - s.td / UNIT - s.st)
  local d = part(tpd, tpd - s.du - s.sd)
  if r + t + d > 0 then
    s.slices[#s.slices + 1] = { id = id, expiry = now_ms + ttl_ms, r = r, t = t, d = d }
  end
  if rpm > 0 or tpm > 0 or tpd > 0 then save(state_key, s, ttl_ms, rpm, tpm, tpd) end

  redis.call('ZREMRANGEBYSCORE', leases_key, '-inf', int(now_ms))
  for _, member in ipairs(redis.call('ZRANGE', leases_key, '0', '-1')) do
    if string.sub(member, 1, 7 + #id) == 'slice:' .. id .. ':' then redis.call('ZREM', leases_key, member) end
  end
  local c = part(cmax, cmax - redis.call('ZCARD', leases_key))
  for slot = 1, c do
    redis.call('ZADD', leases_key, int(now_ms + ttl_ms), 'slice:' .. id .. ':' .. slot)
  end
  if c > 0 then redis.call('PEXPIRE', leases_key, int(math.max(STATE_TTL_MS, 2 * ttl_ms))) end
  for _, amount in ipairs({ r, t, c, d }) do answer[#answer + 1] = amount end
end
return answer
