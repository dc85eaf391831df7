"""The processes of one run on the machines of a Ray cluster (extra ``finetune[ray]``).

::

    finetune run --engine ray   watches over the run (finetune.supervisor)
      '- finetune run ...       the driver: connects to the cluster, keeps a desk, shows what comes in
           Ray Train            one worker for each process, all at once or none
             '- finetune run .. the process itself, with RANK and the rest set, as torchrun would start it

Ray Train places the workers and numbers them. What trains is the same program in a process of its own: a
signal reaches it, its exit code comes back, and a crash of it is no crash of the worker. Ray starts nothing
again and keeps no checkpoint: whoever watches over the run starts all of it again, and the run folder says
where to go on.
"""
