"""What a merge did: the types, the record `gam_merge.json`, the model card."""
