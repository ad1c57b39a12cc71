-- What is left now, without taking any of it. Writes nothing.
-- KEYS: per scope: state, leases.   ARGV: per scope: rpm, tpm, tpd.
-- Answer: per scope: request debt, token debt, live leases, tokens of the day, 0.

local now = now_us()
local answer = {}
for i = 1, #KEYS / 2 do
  local s = load(KEYS[2 * i - 1], now, tonumber(ARGV[3 * i - 2]), tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]))
  answer[#answer + 1] = s.rd + s.sr * UNIT
  answer[#answer + 1] = s.td + s.st * UNIT
  answer[#answer + 1] = redis.call('ZCOUNT', KEYS[2 * i], '(' .. int(math.floor(now / 1000)), '+inf')
  answer[#answer + 1] = s.du + s.sd
  answer[#answer + 1] = 0
end
return answer
