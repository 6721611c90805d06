"""Ranks, DeepSpeed and ZeRO. The only place where ``import deepspeed`` occurs; helpers are identities in one process.

No knowledge of the method, the tasks or the configuration may be imported here.
"""
