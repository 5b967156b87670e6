"""One thread for the tests' own arithmetic: at these tiny shapes, threads cost more in waiting than they gain."""

import torch

torch.set_num_threads(1)
