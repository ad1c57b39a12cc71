-- Admit one request to every scope, or to none.
-- KEYS: epoch, lease, then per scope: state, leases.   ARGV: epoch, lease id, tokens, lease ttl ms, then per scope: rpm,
-- tpm, cmax, tpd (-1: unlimited), and which of them only watch (shadow: sum of 1 rpm, 2 tpm, 4 cmax, 8 tpd).
-- An epoch that is not the one here, or none: what is counted here is not what the caller counts on. '' is not checked.
-- Answer: verdict (0 admitted, 1 refused, 2 another epoch and nothing more), refusing scope (1-based), refusing limit
-- (1 rpm, 2 tpm, 3 cmax, 4 tpd), retry after us (-1: never fits), then per scope: request debt, token debt, live leases,
-- tokens of the day, and which shadow limits would have refused (the same sum).
-- A shadow limit is counted as if it had refused: what it would have refused takes nothing from it. It sees more
-- requests than a limit that refuses would, because its clients are not told to wait.

if ARGV[1] ~= '' and redis.call('GET', KEYS[1]) ~= ARGV[1] then return { 2 } end

local lease_id, tokens, ttl_ms = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_us()
local num_scopes = (#KEYS - 2) / 2
local scopes = {}
local known = redis.call('EXISTS', KEYS[2]) == 1 -- the same lease asked for again: already counted
local verdict, at_scope, at_limit, retry_us = 0, 0, 0, 0

-- The longest wait is reported, so that who waits that long is not refused by another limit; "never" is the longest.
local function refuse(scope, limit, wait)
  local s = scopes[scope]
  if s.shadow[limit] then
    s.would[limit] = true
    return
  end
  if verdict == 0 or (retry_us >= 0 and (wait < 0 or wait > retry_us)) then
    verdict, at_scope, at_limit, retry_us = 1, scope, limit, wait
  end
end

local function wait_us(debt, amount, limit)
  return math.max(1, math.ceil((amount * UNIT - (limit * UNIT - debt)) / limit))
end

for i = 1, num_scopes do
  local state_key, leases_key = KEYS[2 * i + 1], KEYS[2 * i + 2]
  local rpm, tpm, cmax = tonumber(ARGV[5 * i]), tonumber(ARGV[5 * i + 1]), tonumber(ARGV[5 * i + 2])
  local tpd, mask = tonumber(ARGV[5 * i + 3]), tonumber(ARGV[5 * i + 4])
  local s = load(state_key, now, rpm, tpm, tpd)
  s.state_key, s.leases_key, s.rpm, s.tpm, s.cmax, s.tpd = state_key, leases_key, rpm, tpm, cmax, tpd
  s.active = redis.call('ZCOUNT', leases_key, '(' .. int(math.floor(now / 1000)), '+inf')
  s.would, s.shadow = {}, {}
  for limit = 1, 4 do
    s.shadow[limit] = mask % 2 == 1
    mask = math.floor(mask / 2)
  end
  scopes[i] = s
  if not known then
    if rpm == 0 then refuse(i, 1, -1)
    elseif rpm > 0 and UNIT > rpm * UNIT - s.rd - s.sr * UNIT then
      refuse(i, 1, wait_us(s.rd + s.sr * UNIT, 1, rpm))
    end
    if tpm == 0 or (tpm > 0 and tokens > tpm) then refuse(i, 2, -1)
    elseif tpm > 0 and tokens * UNIT > tpm * UNIT - s.td - s.st * UNIT then
      refuse(i, 2, wait_us(s.td + s.st * UNIT, tokens, tpm))
    end
    if cmax == 0 then refuse(i, 3, -1)
    elseif cmax > 0 and s.active >= cmax then refuse(i, 3, 0) end
    if tpd == 0 or (tpd > 0 and tokens > tpd) then refuse(i, 4, -1)
    elseif tpd > 0 and s.du + s.sd + tokens > tpd then refuse(i, 4, math.max(1, (s.dn + 1) * DAY_US - now)) end
  end
end

if verdict == 0 and not known then
  local lease = { 'tokens', int(tokens) }
  for i = 1, num_scopes do
    local s = scopes[i]
    if s.rpm > 0 and not s.would[1] then s.rd = s.rd + UNIT end
    if s.tpm > 0 and not s.would[2] then
      s.td = s.td + tokens * UNIT
      s.open = s.open + tokens
      lease[#lease + 1] = s.state_key
      lease[#lease + 1] = int(s.burnt)
    end
    if s.tpd > 0 and not s.would[4] then
      s.du = s.du + tokens
      lease[#lease + 1] = 'day:' .. s.state_key
      lease[#lease + 1] = int(s.dn)
    end
    if s.rpm > 0 or s.tpm > 0 or s.tpd > 0 then save(s.state_key, s, ttl_ms, s.rpm, s.tpm, s.tpd) end
    redis.call('ZREMRANGEBYSCORE', s.leases_key, '-inf', int(math.floor(now / 1000)))
    redis.call('ZADD', s.leases_key, int(math.floor(now / 1000) + ttl_ms), lease_id)
    redis.call('PEXPIRE', s.leases_key, int(math.max(STATE_TTL_MS, 2 * ttl_ms)))
    s.active = s.active + 1
  end
  redis.call('HSET', KEYS[2], unpack(lease))
  redis.call('PEXPIRE', KEYS[2], int(ttl_ms))
end

local answer = { verdict, at_scope, at_limit, retry_us }
for i = 1, num_scopes do
  local s, would = scopes[i], 0
  for limit = 1, 4 do
    if s.would[limit] then would = would + 2 ^ (limit - 1) end
  end
  answer[#answer + 1] = s.rd + s.sr * UNIT
  answer[#answer + 1] = s.td + s.st * UNIT
  answer[#answer + 1] = s.active
  answer[#answer + 1] = s.du + s.sd
  answer[#answer + 1] = would
end
return answer
