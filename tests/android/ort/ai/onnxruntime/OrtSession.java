package ai.onnxruntime;

import java.io.IOException;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.Map;
import java.util.Optional;
import java.util.Set;

public final class OrtSession implements AutoCloseable {
    private final OrtEnvironment environment;
    private final int handle;
    private final Set<String> inputs = new LinkedHashSet<>();
    private boolean closed;

    OrtSession(OrtEnvironment environment, String path) throws OrtException {
        this.environment = environment;
        try {
            environment.to.writeUTF("open");
            environment.to.writeUTF(path);
            environment.to.flush();
            handle = environment.from.readInt();
            for (int i = environment.from.readInt(); i > 0; i--) inputs.add(environment.from.readUTF());
        } catch (IOException error) {
            throw new OrtException(error);
        }
    }

    public Set<String> getInputNames() {
        return inputs;
    }

    public Result run(Map<String, OnnxTensor> given) throws OrtException {
        if (closed) throw new IllegalStateException("a closed session is used");
        if (!inputs.equals(given.keySet())) throw new OrtException("expected " + inputs + ", found " + given.keySet());
        try {
            environment.to.writeUTF("run");
            environment.to.writeInt(handle);
            environment.to.writeInt(given.size());
            for (Map.Entry<String, OnnxTensor> entry : given.entrySet()) {
                entry.getValue().require();
                environment.to.writeUTF(entry.getKey());
                environment.to.writeInt(entry.getValue().handle);
            }
            environment.to.flush();
            Map<String, OnnxValue> made = new LinkedHashMap<>();
            for (int i = environment.from.readInt(); i > 0; i--) {
                String name = environment.from.readUTF();
                made.put(name, new OnnxTensor(environment, environment.from.readInt()));
            }
            return new Result(made);
        } catch (IOException error) {
            throw new OrtException(error);
        }
    }

    public void close() {
        closed = true;
    }

    public static final class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        private final Map<String, OnnxValue> values;

        Result(Map<String, OnnxValue> values) {
            this.values = values;
        }

        public Optional<OnnxValue> get(String name) {
            return Optional.ofNullable(values.get(name));
        }

        public Iterator<Map.Entry<String, OnnxValue>> iterator() {
            return values.entrySet().iterator();
        }

        public void close() {
            values.values().forEach(OnnxValue::close);
        }
    }

    public static final class SessionOptions {
        public void setIntraOpNumThreads(int count) throws OrtException {}

        public void addConfigEntry(String key, String value) throws OrtException {}

        public void addNnapi() throws OrtException {}

        public void addQnn(Map<String, String> options) throws OrtException {}
    }
}
