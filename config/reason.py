# Black box distillation: the model of out/sft learns from answers that show their work (chapter II-12).
#     python distill.py config/reason.py
out_dir = 'out/reason'
init_from = 'out/sft'
teacher = ''
dataset = 'reason'
learning_rate = 5e-3
report_size = 200
max_new_tokens = 100
