"""Corrections of a flow's draws towards the exact posterior, and the verdict on them: `correct`."""
