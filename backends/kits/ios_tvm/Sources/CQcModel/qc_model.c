/* The C source of the model, compiled for the system of the app. It rounds each product as the tested library does. */
#pragma STDC FP_CONTRACT OFF
#include "../../../model.c"
