-- What is known of a pipe. KEYS: the stream, what is known of it. Returns: its length, the newest id that it ever
-- had, the first and the last id that it has, bytes, the longest message's (-1: unknown), when it was made or reset
-- last in microseconds, where it starts since the last reset, what tells this pipe from another of that name, how many
-- entries were ever added, the newest id that was deleted by itself, and in how many milliseconds all of it expires (-1:
-- never). Where there is no stream the length is -1.

local stream, known = KEYS[1], KEYS[2]
-- Fails for a key of another type.
local length = redis.call('XLEN', stream)
local kept = redis.call('HMGET', known, '.changed', '.floor', '.made', '.count')
if length == 0 and redis.call('EXISTS', stream) == 0 then
    return { -1, '', '', '', -1, -1, '', kept[2] or '', '', 0, '', -1 }
end
local found = info(stream)
local added, there, bytes, largest, _, newest = counted(kept[4])
-- One that others deleted and made again can have the same numbers, but not the same id.
local same = found['last-generated-id'] == (newest ~= '' and newest or '0-0')
if same and tonumber(added) == found['entries-added'] and tonumber(there) == length then
    bytes, largest = tonumber(bytes), tonumber(largest)
else
    bytes, largest = count(stream, length)
end
local first, last = found['first-entry'], found['last-entry']
-- Not everybody may ask.
local expires = redis.pcall('PTTL', stream)
return {
    length, found['last-generated-id'], first and first[1] or '', last and last[1] or '',
    bytes, largest, kept[1] or '', kept[2] or '', kept[3] or '',
    found['entries-added'], found['max-deleted-entry-id'], tonumber(expires) or -1,
}
