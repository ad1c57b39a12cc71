-- End a lease and give back the tokens it did not use, exactly once: a lease that is gone gives back nothing.
-- KEYS: lease, then per scope: state, leases.   ARGV: lease id, tokens used, then per scope: rpm, tpm, tpd.
-- Answer: 1 if the lease was live, else 0.

local lease_id, used = ARGV[1], tonumber(ARGV[2])
local now = now_us()
local num_scopes = (#KEYS - 1) / 2
local lease = redis.call('HGETALL', KEYS[1])
if #lease == 0 then return 0 end
redis.call('DEL', KEYS[1])

local field = {}
for i = 1, #lease, 2 do field[lease[i]] = tonumber(lease[i + 1]) end
local reserved = field['tokens']
local unused = math.max(0, reserved - used)

for i = 1, num_scopes do
  local state_key, leases_key = KEYS[2 * i], KEYS[2 * i + 1]
  local rpm, tpm, tpd = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  redis.call('ZREM', leases_key, lease_id)
  local burnt_then = field[state_key]
  local day_then = field['day:' .. state_key]
  if (burnt_then or day_then) and redis.call('EXISTS', state_key) == 1 then
    local s = load(state_key, now, rpm, tpm, tpd)
    if burnt_then then
      local mine = math.max(0, math.min(s.open, reserved - (s.burnt - burnt_then)))
      s.td = s.td - math.min(unused, mine) * UNIT
      s.open = s.open - mine
    end
    if day_then == s.dn then s.du = math.max(0, s.du - unused) end -- yesterday's is over
    save(state_key, s, 0, rpm, tpm, tpd)
  end
end
return 1
