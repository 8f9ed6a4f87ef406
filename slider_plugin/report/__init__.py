"""`slider report`: what a slider does, in numbers, one picture, one plot and one sentence.

Rooms: `axis` (what more and less of the concept is, in latents), `scorers` (the same by another model), `probe` (what is
drawn), `scores` (numbers of it), `flags` (what is wrong, in words), `card` (the report's JSON), `plot`, `calibrate`, `sets`
(several sliders), `command` (the command line's stages) and `watching` (reports while a run trains).
"""
