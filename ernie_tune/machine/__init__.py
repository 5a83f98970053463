"""How a run lies on its processes: alone, or spread over a Fleet mesh."""
