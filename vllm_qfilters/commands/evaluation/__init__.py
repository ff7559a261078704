"""What compression costs in quality, measured on the real engine: the command ``vllm-qfilters eval``.

:mod:`tasks` make requests and measure what comes back, :mod:`engine` runs them in a process of its own, :mod:`evaluate`
goes through methods and tasks, :mod:`results` keeps what is measured, :mod:`report` and :mod:`plots` show it.
"""
