"""`calibri_lightning bench`: how fast the evaluation loop is, against the loop that one would write first."""
