"""Ranks, DeepSpeed and ZeRO. The only place where ``import deepspeed`` occurs; every helper is an identity in one process.

No knowledge of the method, the tasks or the configuration may be imported here.
"""
