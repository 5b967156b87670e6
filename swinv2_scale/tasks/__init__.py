"""Tasks: head, loss, metric and pictures. What `swinv2_scale.train.Task` lists is all that the loop knows of them."""
