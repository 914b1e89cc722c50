"""What a data owner allows and has spent: policy, approval, plan and ledger."""
