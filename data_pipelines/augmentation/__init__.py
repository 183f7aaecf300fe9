"""On the device, a batch at a time, from drawn numbers: policies, colour, erasing, mixing.

Numbers are drawn on the host for the *global* batch by :mod:`data_pipelines.order`, cut to a rank's rows, and sent in
one copy. On the device each operation is made of single rounded steps on whole pixels, so a row has the same bits in
any company, and the host never waits.
"""
