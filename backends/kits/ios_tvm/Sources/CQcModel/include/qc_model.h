/* The functions of the model, for Swift. */
#include "../../../../model.h"
