-- SPDX-License-Identifier: Apache-2.0
-- The load that wrk puts on the service: of ten requests four ask for a new adapter, three for one that is there, two
-- read one, and one lists them. Arguments: how many requests, a seed, ids of adapters that are there.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  most, seed = tonumber(arguments[1]), arguments[2]
  known = {}
  for place = 3, #arguments do known[#known + 1] = arguments[place] end
  sent, answered, statuses = 0, 0, ""
  count = {}
  headers = { ["Content-Type"] = "application/json" }
end

local function post(text)
  return wrk.format("POST", "/v1/adapters", headers, '{"prompts": ["' .. text .. '", "what is the law ?"]}')
end

function request()
  sent = sent + 1
  local kind = sent % 10
  if kind < 4 then return post("new " .. seed .. " " .. sent) end
  local number = (sent * 7) % #known
  if kind < 7 then return post("known " .. number) end
  if kind < 9 then return wrk.format("GET", "/v1/adapters/" .. known[number + 1]) end
  return wrk.format("GET", "/v1/adapters?limit=10")
end

function response(status)
  answered = answered + 1
  count[status] = (count[status] or 0) + 1
  if answered == most then
    for value, times in pairs(count) do statuses = statuses .. value .. "=" .. times .. " " end
    wrk.thread:stop()
    io.stderr:write("ALL ANSWERED\n")
  end
end

function done(summary, latency)
  print(string.format("RESULT p50_us=%d p99_us=%d max_us=%d seconds=%.3f bytes=%d socket_errors=%d %s",
    latency:percentile(50), latency:percentile(99), latency.max, summary.duration / 1e6, summary.bytes,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    threads[1]:get("statuses")))
end
