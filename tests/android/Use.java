import java.io.File;
import java.util.Arrays;
import java.util.Iterator;
import java.util.stream.Collectors;
import qc.model.ArtifactException;
import qc.model.Model;
import qc.model.Text;

/** Uses the kit for Android as an app does: Use ARTIFACT TOKEN... prints a continuation as ids, then as text. */
public final class Use {
    /** A tokenizer whose texts are ids with spaces between them. */
    private static final class Numbers implements Text {
        public long[] encode(String text, boolean special) {
            return Arrays.stream(text.split(" ")).mapToLong(Long::parseLong).toArray();
        }

        public String decode(long[] tokens) {
            return Arrays.stream(tokens).mapToObj(Long::toString).collect(Collectors.joining(" "));
        }
    }

    public static void main(String[] arguments) {
        if (arguments[1].contains(".")) { // as a kit over a runtime of that version checks it
            try {
                qc.model.Artifact.INSTANCE.check(new File(arguments[0]), java.util.Collections.emptyList(), arguments[1]);
            } catch (Exception error) {
                System.err.println(error.getMessage());
                System.exit(1);
            }
            return;
        }
        long[] prompt = Arrays.stream(arguments).skip(1).mapToLong(Long::parseLong).toArray();
        try (Model model = Model.open(new File(arguments[0]), new Numbers())) {
            Iterator<Long> tokens = model.generateTokens(prompt, 8).iterator();
            StringBuilder ids = new StringBuilder();
            while (tokens.hasNext()) ids.append(tokens.next()).append(' ');
            System.out.println(ids.toString().trim());
            String text = Arrays.stream(prompt).skip(1).mapToObj(Long::toString).collect(Collectors.joining(" "));
            StringBuilder said = new StringBuilder();
            for (Iterator<String> pieces = model.generate(text, 8).iterator(); pieces.hasNext(); ) said.append(pieces.next());
            System.out.println(said);
        } catch (Exception error) {
            System.err.println(error.getMessage());
            System.exit(error instanceof ArtifactException ? 1 : 2);
        }
    }
}
