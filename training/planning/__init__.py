"""What a step costs, by count and by search. Nothing here knows the process of a run."""
