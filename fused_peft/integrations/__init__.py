"""What ties fused_peft to other libraries; each module imports its library itself."""
