"""All questions, one after the other."""

from perf import hop, http2, idle, loopguard

print("-- the cost of a hop")
hop.main()
print("-- the cost of a hop in HTTP/2")
http2.main()
print("-- the memory of an idle connection")
idle.main()
print("-- the cost of the loop guard")
loopguard.main()
