"""All questions, one after the other."""

from perf import hop, idle

print("-- the cost of a hop")
hop.main()
print("-- the memory of an idle connection")
idle.main()
