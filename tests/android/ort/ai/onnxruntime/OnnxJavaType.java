package ai.onnxruntime;

public enum OnnxJavaType { FLOAT, INT32, INT64, FLOAT16 }
