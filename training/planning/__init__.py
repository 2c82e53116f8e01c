"""What a training step costs: predicted by a cost model (plan), or measured by trials (tune).

Nothing here knows the processes of a training run: no engine, no data, no process group.
"""
