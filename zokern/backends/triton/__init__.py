def why_not(d): return "x"
why_not_by_default=why_not
