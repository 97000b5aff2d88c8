-- Return one claim, ahead of everything that waits.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       sequence    counter     order of arrival of parked jobs      nobody
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       claimed     hash        task id -> claim id                  finish, put back
-- ARGV  claim id, '1' if the delivery was lost with its process
-- Returns 'given back' or 'superseded'.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], sequence = KEYS[5],
    deliveries = KEYS[6], bell = KEYS[7], claimed = KEYS[8],
}
if put_back(K, K.claims, ARGV[1], ARGV[2] == '1') then
    return 'given back'
end
return 'superseded'
