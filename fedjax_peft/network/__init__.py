"""The network: where clients are, how fast their links are, what a round costs.

Everything here runs on the host, in numpy and float64, for all clients of a
round at once. Units are SI: seconds, joules, watts, hertz, metres; bytes are
integers, rates are bits per second, money is dollars, carbon is grams.
"""
