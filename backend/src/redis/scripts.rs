//! What the server does in one step each.
//!
//! KEYS: the entry, the store's index, its keys that end, and how the names of its entries begin. Redis runs a script whole
//! or not at all: the first command that writes is one that it refuses without memory, so nothing is half written.

use redis::Script;

pub(super) struct Scripts {
    pub(super) get: Script,
    pub(super) set: Script,
    pub(super) delete: Script,
    pub(super) increment: Script,
    pub(super) list: Script,
}

/// ARGV: the longest value. A longer one is not sent: its length is told.
const GET: &str = "
local e = redis.call('HMGET', KEYS[1], 'n', 'm', 'r', 't')
if not e[3] then
  if redis.call('EXISTS', KEYS[1]) == 0 then return false end
  return {2, false, false, false, false, false, -1}
end
local length = redis.call('HSTRLEN', KEYS[1], 'v')
if length > tonumber(ARGV[1]) then return {1, length, false, false, false, false, -1} end
return {0, e[1], redis.call('HGET', KEYS[1], 'v'), e[2], e[3], e[4], redis.call('PTTL', KEYS[1])}
";

/// The server's time, and what takes the keys that ended out of the index: a few with each write, so that there are never
/// many. One that has not ended by the server's own clock, or was given another end by somebody else, keeps its place.
const TIME: &str = "
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function sweep()
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 16)) do
    local left = redis.call('PTTL', KEYS[4] .. key)
    if left == -2 then
      redis.call('ZREM', KEYS[2], key)
      redis.call('ZREM', KEYS[3], key)
    elseif left == -1 then
      redis.call('ZREM', KEYS[3], key)
    else
      redis.call('ZADD', KEYS[3], now + left + 1, key)
    end
  end
end
";

/// ARGV: key, version, milliseconds to live, value, metadata, condition.
const SET: &str = "
if ARGV[6] ~= '' then
  local stands = redis.call('HGET', KEYS[1], 'r')
  if ARGV[6] == 'absent' then
    if stands then return 0 end
  elseif not stands or '=' .. stands ~= ARGV[6] then
    return 0
  end
end
redis.call('HSET', KEYS[1], 'v', ARGV[4], 'm', ARGV[5], 'r', ARGV[2], 't', now)
redis.call('HDEL', KEYS[1], 'n')
redis.call('ZADD', KEYS[2], 0, ARGV[1])
if ARGV[3] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('ZADD', KEYS[3], now + ARGV[3], ARGV[1])
else
  redis.call('PERSIST', KEYS[1])
  redis.call('ZREM', KEYS[3], ARGV[1])
end
sweep()
return 1
";

/// ARGV: key.
const DELETE: &str = "
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
sweep()
";

/// ARGV: key, version, milliseconds to live of a new counter, what to add, and where a value was found before: the number
/// that it is, and its version. Lua's numbers have 53 bits, so they are passed as text and added by Redis itself.
const INCREMENT: &str = "
local e = redis.call('HMGET', KEYS[1], 'n', 'r', 'm')
local is_new = not e[2]
if is_new and redis.call('EXISTS', KEYS[1]) == 1 then return {2, '', ''} end
if not is_new and not e[1] then
  if redis.call('HSTRLEN', KEYS[1], 'v') ~= 8 or (e[3] and e[3] ~= '') then return {2, '', ''} end
  if ARGV[6] ~= e[2] then return {1, redis.call('HGET', KEYS[1], 'v'), e[2]} end
  redis.call('HSET', KEYS[1], 'n', ARGV[5])
  redis.call('HDEL', KEYS[1], 'v')
end
local sum = redis.pcall('HINCRBY', KEYS[1], 'n', ARGV[4])
if type(sum) == 'table' then
  if string.find(sum['err'], 'overflow', 1, true) or string.find(sum['err'], 'not an integer', 1, true) then
    return {2, '', ''}
  end
  return sum
end
redis.call('HSET', KEYS[1], 'r', ARGV[2], 't', now)
redis.call('ZADD', KEYS[2], 0, ARGV[1])
if is_new and ARGV[3] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('ZADD', KEYS[3], now + ARGV[3], ARGV[1])
end
sweep()
return {0, redis.call('HGET', KEYS[1], 'n'), ''}
";

/// ARGV: first and last of the range, and how many. Answers how many were looked at, the last of them, and those that are
/// there: what has ended is taken out of the index.
const LIST: &str = "
local keys = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
local found = {}
for _, key in ipairs(keys) do
  local e = redis.call('HMGET', KEYS[4] .. key, 'r', 'n', 't')
  if e[1] then
    local length = e[2] and 8 or redis.call('HSTRLEN', KEYS[4] .. key, 'v')
    found[#found + 1] = {key, length, e[3] or '0'}
  else
    redis.call('ZREM', KEYS[2], key)
    redis.call('ZREM', KEYS[3], key)
  end
end
return {#keys, keys[#keys] or false, found}
";

impl Scripts {
    pub(super) fn new() -> Self {
        let timed = |script: &str| Script::new(&[TIME, script].concat());
        Self {
            get: Script::new(GET),
            set: timed(SET),
            delete: timed(DELETE),
            increment: timed(INCREMENT),
            list: Script::new(LIST),
        }
    }
}
