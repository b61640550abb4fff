"""DETR, ResNet-50, 300 epochs. Published: 42.0 AP on COCO val2017 after 500 epochs, with lr_drop
400; 39.5 after 150."""

modelname = "detr"
num_queries = 100
pe_temperatureH = 10000
pe_temperatureW = 10000
dropout = 0.1
set_cost_class = 1
num_select = 100  # all queries
epochs = 300
lr_drop = 200
