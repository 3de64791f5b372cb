-- What is known of a pipe. KEYS: the stream, `meta`. Returns nothing where there is no stream, else: its length,
-- the last id it ever had, the first and the last id it has, bytes, the longest message's (-1: unknown), when it
-- was made or reset last in microseconds, where it starts since the last reset, and what tells this pipe from
-- another of that name.

local stream, meta = KEYS[1], KEYS[2]
local length = redis.call('XLEN', stream)
local kept = redis.call('HMGET', meta, 'modified', 'floor', 'made')
if redis.call('EXISTS', stream) == 0 then
    return { -1, '', '', '', -1, -1, '', kept[2] or '', '' }
end
local found = info(stream)
local bytes, largest = count(stream, length, counted(meta))
local first, last = found['first-entry'], found['last-entry']
return {
    length, found['last-generated-id'], first and first[1] or '', last and last[1] or '',
    bytes, largest, kept[1] or '', kept[2] or '', kept[3] or '',
}
