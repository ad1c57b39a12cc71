-- Put in front of every script of version 3. Lua's numbers are doubles: every value here stays an integer below 2^53.
--
-- GCRA, kept as a debt instead of as an arrival time. A scope owes `debt` for what it was admitted lately; the debt
-- drains at the limit's rate, and a request of n is admitted if debt + n <= one minute's allowance. Debt is counted in
-- units of 1/60,000,000 (of a request, or of a token): a limit of L per minute drains exactly L units a microsecond, so
-- nothing is ever rounded, and a limit that changes needs no conversion.
--
-- State of a scope, a hash: rd, rt = request debt and when it was last drained (us); td, tt = the same for tokens;
-- open = tokens reserved by leases that may still be given back; burnt = tokens that no lease can give back any more.
-- dn, du = the day (UTC, since the epoch) and the tokens used and reserved in it: a day is counted, not drained, since
-- its allowance in units would pass 2^53. A clock set back goes on counting in the later day.
-- sl = slices, each `id,expiry ms,requests,tokens,tokens of a day;`: what a gateway has taken beforehand, to spend while
-- it cannot reach this server. A slice is kept apart from the debt, since a debt drains while nobody knows whether the
-- slice was spent: others have that much less. One that ends without a word counts as spent at that moment.
-- Leases of a scope, a sorted set: lease id -> expiry (ms).

local UNIT = 60000000
local STATE_TTL_MS = 3600000
local DAY_US = 86400000000

local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

local function int(n)
  return string.format('%.0f', n)
end

local function drained(debt, since, now, limit)
  if now <= since then return debt end
  local gone = (now - since) * limit
  if gone >= debt then return 0 end
  return debt - gone
end

-- The live slices of a scope and what they come to. One that has ended counts as spent when it ended, whenever it is
-- looked at, so that its debt drains from then on.
local function take_slices(s, text, rpm, tpm)
  s.slices, s.sr, s.st, s.sd = {}, 0, 0, 0
  if text == false or text == '' then return end
  local ended = {}
  for id, expiry, r, t, d in string.gmatch(text, '([^,;]+),(%d+),(%d+),(%d+),(%d+);') do
    local one = { id = id, expiry = tonumber(expiry), r = tonumber(r), t = tonumber(t), d = tonumber(d) }
    if one.expiry * 1000 > s.now then
      s.slices[#s.slices + 1] = one
      s.sr, s.st, s.sd = s.sr + one.r, s.st + one.t, s.sd + one.d
    else
      ended[#ended + 1] = one
    end
  end
  table.sort(ended, function(a, b) return a.expiry < b.expiry end)
  for _, one in ipairs(ended) do
    local at = one.expiry * 1000
    if rpm > 0 then s.rd, s.rt = drained(s.rd, s.rt, at, rpm), math.max(s.rt, at) end
    if tpm > 0 then s.td, s.tt = drained(s.td, s.tt, at, tpm), math.max(s.tt, at) end
    s.rd, s.td = s.rd + one.r * UNIT, s.td + one.t * UNIT
    if at >= s.dn * DAY_US then s.du = s.du + one.d end
  end
end

local function load(key, now, rpm, tpm, tpd)
  local h = redis.call('HMGET', key, 'rd', 'rt', 'td', 'tt', 'open', 'burnt', 'dn', 'du', 'sl')
  for i = 1, 8 do h[i] = tonumber(h[i] or 0) end
  local s = { now = now, rd = h[1], rt = h[2], td = h[3], tt = h[4], open = h[5], burnt = h[6], dn = h[7], du = h[8] }
  local today = math.floor(now / DAY_US)
  if tpd > 0 and today > s.dn then s.dn, s.du = today, 0 end
  take_slices(s, h[9], rpm, tpm)
  if rpm > 0 then
    s.rd, s.rt = drained(s.rd, s.rt, now, rpm), math.max(s.rt, now) -- a clock set back drains nothing
  end
  if tpm > 0 then
    s.td, s.tt = drained(s.td, s.tt, now, tpm), math.max(s.tt, now)
  end
  -- What has drained by itself is not given back a second time: tokens that may come back never exceed the debt.
  local owed = (s.td - s.td % UNIT) / UNIT
  if s.open > owed then
    s.burnt = s.burnt + (s.open - owed)
    s.open = owed
  end
  return s
end

local function save(key, s, ttl_ms, rpm, tpm, tpd)
  local keep = math.max(STATE_TTL_MS, 2 * ttl_ms)
  -- A limit that was lowered far below its debt drains for longer than a minute: keep the debt until it is gone.
  if rpm > 0 then keep = math.max(keep, math.ceil(s.rd / rpm / 1000)) end
  if tpm > 0 then keep = math.max(keep, math.ceil(s.td / tpm / 1000)) end
  if tpd > 0 then keep = math.max(keep, 2 * DAY_US / 1000) end
  local slices = ''
  for _, one in ipairs(s.slices) do
    slices = slices .. one.id .. ',' .. int(one.expiry) .. ',' .. int(one.r) .. ',' .. int(one.t) .. ',' .. int(one.d) .. ';'
    keep = math.max(keep, 2 * (one.expiry - math.floor(s.now / 1000)))
  end
  redis.call('HSET', key, 'rd', int(s.rd), 'rt', int(s.rt), 'td', int(s.td), 'tt', int(s.tt),
    'open', int(s.open), 'burnt', int(s.burnt), 'dn', int(s.dn), 'du', int(s.du))
  if slices ~= '' then redis.call('HSET', key, 'sl', slices) else redis.call('HDEL', key, 'sl') end
  redis.call('PEXPIRE', key, int(keep))
end
